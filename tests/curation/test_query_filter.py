from collections.abc import Sequence

import pytest

from qwen3_lit.curation.decontaminate import HeldOutIndex
from qwen3_lit.curation.query_filter import (
    QueryFilterConfig,
    Record,
    check_query,
    filter_queries,
    named_domain,
    query_key,
    surplus,
)
from qwen3_lit.curation.synthesis import SynthesisRequest, synthesize
from qwen3_lit.curation.verification import AnswerVerifier
from qwen3_lit.errors import UserError


def problem(query: str, answer: str = "4", **columns: object) -> Record:
    return {"messages": [{"role": "user", "content": query}], "answer": answer, "task": "t"} | columns


@pytest.mark.parametrize(
    ("query", "answer", "reason"),
    [
        ("What is 2 + 2?", "4", None),
        ("", "4", "empty_query"),
        ("What is 2 + 2?", " ", "empty_answer"),
        ("What is 2 + 2? And what is 3 + 3?", "4", "multi_part"),
        ("Let x = 1.\n(a) Find x + 1.\n(b) Find x + 2.", "4", "multi_part"),
        ("1. Compute 2 + 2.\n2. Compute 3 + 3.", "4", "multi_part"),
        ("Sort: 1, 2\n## 1. Let all answers be a list.\n## 2. Convert all numbers.", "4", None),
        ("Write an essay about the sea.", "The sea is wide and deep and blue.", "open_ended"),
        ("Write 12 as a product of primes.", "2 * 2 * 3", None),
        ("What happened?", "word " * 50, "open_ended"),
    ],
)
def test_check_query(query: str, answer: str, reason: str | None) -> None:
    assert check_query(problem(query, answer), QueryFilterConfig()) == reason


def test_made_up_problems_pass() -> None:
    for record in synthesize("problems", SynthesisRequest(count=60)):
        assert check_query(record, QueryFilterConfig()) is None


class FixedJudge:
    """Solves even numbers without thinking and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def solves(self, records: Sequence[Record]) -> list[bool]:
        self.asked += [record["answer"] for record in records]
        return [int(record["answer"]) % 2 == 0 for record in records]

    def label_domains(self, records: Sequence[Record], domains: Sequence[str]) -> list[str | None]:
        return ["math" if int(record["answer"]) > 5 else None for record in records]


def test_filter_queries_counts_each_reason_once() -> None:
    records = [problem(f"What is {n} + 0?", str(n)) for n in range(1, 9)]
    records += [problem("What is 1 + 1? What is 2?", "3"), problem("What is it?", "")]
    broken = problem("Sort 2, 1", "not a list", metadata={"source_dataset": "number_sorting", "direction": "ascending"})
    keyed = {query_key(record): record for record in [*records, broken]}
    judge = FixedJudge()
    with AnswerVerifier() as verifier:
        decision = filter_queries(
            keyed,
            QueryFilterConfig(),
            verifier=verifier,
            held_out=HeldOutIndex(["What is 7 + 0?"]),
            judge=judge,
            domain_labels=("math", "other"),
        )
    assert decision.dropped == {
        "held_out_similarity": 1,
        "answered_without_thinking": 4,
        "multi_part": 1,
        "empty_answer": 1,
        "unparsable_answer": 1,
    }
    assert sorted(judge.asked) == ["1", "2", "3", "4", "5", "6", "8"]
    kept = {keyed[key]["answer"] for key, reason in decision.reasons.items() if reason is None}
    assert kept == {"1", "3", "5"}


def test_surplus_is_decided_by_hash_and_bounds_the_domains() -> None:
    keys = list(range(100))
    domains = ["a"] * 80 + ["b"] * 10 + ["c"] * 10
    dropped = surplus(keys, domains, 2.0)
    assert len(dropped) == 60 and all(key < 80 for key in dropped)
    assert surplus(keys[::-1], domains[::-1], 2.0) == dropped


def test_named_domain_and_config() -> None:
    assert named_domain("I think Physics, not math.", ("math", "physics")) == "physics"
    assert named_domain("none", ("math",)) is None
    with pytest.raises(UserError, match="max_domain_ratio"):
        QueryFilterConfig(max_domain_ratio=0)
