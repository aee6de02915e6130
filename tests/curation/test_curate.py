import json
from collections import Counter
from pathlib import Path

import pytest

from qwen3_lit.curation.curate import CurationConfig, curate
from qwen3_lit.curation.synthesis import SynthesisRequest, synthesize_to_file
from qwen3_lit.curation.verification import AnswerVerifier
from qwen3_lit.data.schema import read_records
from qwen3_lit.errors import UserError

OPTIONS = {
    "chain_sum.max_terms": 2,
    "chain_sum.min_digits": 2,
    "chain_sum.max_digits": 2,
    "products.digits": "2x1",
    "wrong_answer": 0.1,
    "repetition": 0.1,
    "guessing": 0.1,
    "disagreement": 0.1,
    "language_mixing": 0.1,
    "held_out_similarity": 0.1,
}
TASKS = ("chain_sum", "products", "spell_backward", "number_sorting", "letter_counting")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("curate")
    paths = {name: str(folder / f"{name}.jsonl") for name in ("held_out", "problems", "candidates")}
    plain = {name: value for name, value in OPTIONS.items() if "." in name}
    held_out = SynthesisRequest(count=60, split="held_out", tasks=TASKS, options=plain)
    synthesize_to_file("problems", held_out, paths["held_out"])
    synthesize_to_file("problems", SynthesisRequest(count=150, seed=1, tasks=TASKS, options=plain), paths["problems"])
    request = SynthesisRequest(
        count=150, tasks=TASKS, options=OPTIONS, problems=paths["problems"], held_out=paths["held_out"]
    )
    synthesize_to_file("reasoning_candidates", request, paths["candidates"])
    return paths


def test_filters_find_the_flaws_and_spare_the_sound(files: dict[str, str], tmp_path: Path) -> None:
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    flaws = Counter(r["provenance"]["flaw"] for r in read_records(files["candidates"], "conversation"))
    unlimited = CurationConfig(per_query=None)
    with AnswerVerifier() as verifier:
        result = curate(
            files["candidates"],
            str(out),
            config=unlimited,
            verifier=verifier,
            problems=files["problems"],
            held_out=[files["held_out"]],
            report=str(report),
        )
    kept = list(read_records(out, "conversation"))
    kept_flaws = Counter(record["provenance"]["flaw"] for record in kept)
    assert set(kept_flaws) == {None}, "a flawed response came through"
    # Equal responses to one query are dropped as duplicates: each sound query must still be there.
    sound = [r for r in read_records(files["candidates"], "conversation") if r["provenance"]["flaw"] is None]
    assert {r["problem_id"] for r in kept} == {r["problem_id"] for r in sound}
    assert result["dropped"].pop("duplicate") == len(sound) - len(kept)
    for reason, count in result["dropped"].items():
        assert abs(count - flaws[reason]) <= 2, (reason, count, flaws[reason])
    assert result["seen"] == sum(flaws.values()) == 600
    assert result["kept"] == len(kept) and result["kept_fraction"] == len(kept) / 600
    assert json.loads(report.read_text())["kept"] == len(kept)


def test_careless_candidates_stay_where_they_came_out_right(tmp_path: Path) -> None:
    candidates, out = tmp_path / "candidates.jsonl", tmp_path / "out.jsonl"
    flawless = dict.fromkeys(OPTIONS.keys() - {name for name in OPTIONS if "." in name}, 0.0)
    options = {"chain_sum.max_terms": 2, "chain_sum.max_digits": 2, "n": 1, "careless_share": 1.0, **flawless}
    request = SynthesisRequest(count=80, tasks=("chain_sum",), options=options)
    synthesize_to_file("reasoning_candidates", request, str(candidates))
    with AnswerVerifier() as verifier:
        result = curate(str(candidates), str(out), config=CurationConfig(), verifier=verifier)
    kept = list(read_records(out, "conversation"))
    assert 10 < len(kept) < 60 and set(result["dropped"]) == {"wrong_answer"}
    for record in kept:
        assert record["messages"][-1]["content"] == record["answer"] and record["provenance"]["careless"]


def test_provenance_is_not_read(files: dict[str, str], tmp_path: Path) -> None:
    bare = tmp_path / "bare.jsonl"
    with open(files["candidates"]) as source, open(bare, "w") as target:
        for line in source:
            record = json.loads(line)
            del record["provenance"]
            target.write(json.dumps(record) + "\n")
    with AnswerVerifier() as verifier:
        results = [
            curate(path, str(tmp_path / "o.jsonl"), config=CurationConfig(), verifier=verifier)
            for path in (str(bare), files["candidates"])
        ]
    assert results[0] == results[1]


def test_per_query_and_max_samples_spread_over_domains(files: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with AnswerVerifier() as verifier:
        config = CurationConfig(per_query=1, max_samples=20)
        result = curate(files["candidates"], str(out), config=config, verifier=verifier)
    kept = list(read_records(out, "conversation"))
    assert len(kept) == result["kept"] == 20
    assert len({record["problem_id"] for record in kept}) == 20
    assert result["domains"] == dict.fromkeys(sorted(TASKS), 4)


def test_candidates_without_reference_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "b"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    with AnswerVerifier() as verifier, pytest.raises(UserError, match="field 'answer': missing"):
        curate(str(path), str(tmp_path / "o.jsonl"), config=CurationConfig(), verifier=verifier)
    assert not (tmp_path / "o.jsonl").exists()


def test_one_question_under_two_system_prompts_is_two_queries(tmp_path: Path) -> None:
    path, out = tmp_path / "c.jsonl", tmp_path / "o.jsonl"

    def candidate(base: str, written: str, answer: str) -> dict[str, object]:
        thinking = f"The sum of 3 and 4 is seven, which in base {base} is written {written}\n{written}"
        turns = [
            {"role": "system", "content": f"Answer in base {base}."},
            {"role": "user", "content": "What is 3 + 4?"},
            {"role": "assistant", "content": written, "reasoning_content": thinking},
        ]
        return {"messages": turns, "answer": answer, "task": "sum"}

    rows = [candidate("10", "7", "7"), candidate("2", "111", "111"), candidate("2", "7", "111")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with AnswerVerifier() as verifier:
        result = curate(str(path), str(out), config=CurationConfig(), verifier=verifier)
    assert [record["answer"] for record in read_records(out, "conversation")] == ["7", "111"]
    assert result["queries"]["seen"] == 2 and result["dropped"] == {"wrong_answer": 1}


def test_tool_dialogs_are_judged_by_their_calls(tmp_path: Path) -> None:
    path, out = tmp_path / "c.jsonl", tmp_path / "o.jsonl"
    tools = [{"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "47 * 38"}}}
    query = {"role": "user", "content": "What is 47 * 38?"}
    asks = {"role": "assistant", "content": "", "reasoning_content": "The tool can do it.", "tool_calls": [call]}

    def candidate(result: dict[str, str] | None, answer: str, **more: object) -> dict[str, object]:
        last = {"role": "assistant", "content": answer, "reasoning_content": f"It is what the tool says: {answer}"}
        turns = [query, last] if result is None else [query, asks, result, last]
        return {"messages": turns, "answer": "1786", "task": "tool", "tools": tools} | more

    result = {"role": "tool", "content": "1786"}
    wrapped = {"role": "user", "content": "<tool_response>\n1786\n</tool_response>"}
    rows = [candidate(result, "1786"), candidate(result, "1787"), candidate(None, "1786"), candidate(wrapped, "1786.")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with AnswerVerifier() as verifier:
        counts = curate(str(path), str(out), config=CurationConfig(per_query=None), verifier=verifier)
    kept = [record["messages"] for record in read_records(out, "conversation")]
    assert kept == [rows[0]["messages"], rows[3]["messages"]]
    assert counts["dropped"] == {"wrong_answer": 2} and counts["queries"]["seen"] == 1


def test_nothing_kept_is_an_error_that_counts_the_reasons(files: dict[str, str], tmp_path: Path) -> None:
    path, out, report = tmp_path / "c.jsonl", tmp_path / "o.jsonl", tmp_path / "r.json"
    records = [json.loads(line) for line in Path(files["candidates"]).read_text().splitlines()[:30]]
    for record in records:
        record["messages"][-1]["content"] = "no idea"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with AnswerVerifier() as verifier, pytest.raises(UserError, match=r"none of 30 candidates.*\d+ wrong_answer"):
        curate(str(path), str(out), config=CurationConfig(), verifier=verifier, report=str(report))
    assert not out.exists() and json.loads(report.read_text())["kept"] == 0


def test_bad_records_are_skipped_when_told_so(files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    lines = Path(files["candidates"]).read_text().splitlines()[:40]
    path.write_text("\n".join([*lines, "{broken"]) + "\n")
    with AnswerVerifier() as verifier:
        with pytest.raises(UserError, match=r"c\.jsonl:41"):
            curate(str(path), str(tmp_path / "o.jsonl"), config=CurationConfig(), verifier=verifier)
        skipping = CurationConfig(on_bad_record="skip")
        assert curate(str(path), str(tmp_path / "o.jsonl"), config=skipping, verifier=verifier)["seen"] == 40
