import json
from pathlib import Path

import pytest

from qwen3_lit.curation import synthesis_problems
from qwen3_lit.curation.synthesis import KINDS, SynthesisRequest, parse_options, synthesize, synthesize_to_file
from qwen3_lit.curation.synthesis_problems import check_scorer, query_text
from qwen3_lit.curation.synthesis_split import normalized_text, split_of, stream_seed
from qwen3_lit.curation.verification import AnswerVerifier, response_input
from qwen3_lit.data.schema import read_records
from qwen3_lit.errors import UserError

SMALL = {
    "chain_sum.max_terms": 2,
    "chain_sum.max_digits": 2,
    "chain_sum.min_digits": 1,
    "products.digits": "2x1",
    "number_sorting.max_numbers": 4,
    "count_bits.max_n": 255,
}
TASKS = ("chain_sum", "products", "number_sorting", "count_bits")
SCHEMA = {
    "problems": "problem",
    "worked_steps": "text",
    "reasoning_candidates": "conversation",
    "general_problems": "problem",
    "dialogs": "conversation",
    "preferences": "preference",
}


def request(kind: str, **changes: object) -> SynthesisRequest:
    arithmetic = kind in ("problems", "worked_steps", "reasoning_candidates")
    settings = {"count": 40, "seed": 5, "tasks": TASKS if arithmetic else (), "options": SMALL if arithmetic else {}}
    return SynthesisRequest(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_same_request_same_file_and_valid_records(kind: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    count = synthesize_to_file(kind, request(kind), str(first))
    synthesize_to_file(kind, request(kind), str(second))
    assert first.read_bytes() == second.read_bytes()
    assert len(list(read_records(first, SCHEMA[kind]))) == count  # type: ignore[arg-type]
    synthesize_to_file(kind, request(kind, seed=6), str(second))
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize("kind", ["problems", "general_problems"])
def test_no_query_is_in_both_splits(kind: str) -> None:
    texts: dict[str, set[str]] = {}
    for split in ("train", "held_out"):
        records = [
            record for seed in range(3) for record in synthesize(kind, request(kind, count=80, seed=seed, split=split))
        ]
        texts[split] = {normalized_text(query_text(record)) for record in records if record["task"] != "mode_flags"}
        assert all(split_of(text) == split for text in texts[split])
        assert {record["split"] for record in records} == {split}
    assert texts["train"] and texts["held_out"] and not texts["train"] & texts["held_out"]


def test_neighbouring_seeds_share_few_problems() -> None:
    texts = [
        {
            query_text(r)
            for r in synthesize("problems", request("problems", seed=seed, tasks=("chain_sum",), options={}))
        }
        for seed in (1, 2)
    ]
    assert len(texts[0] & texts[1]) < 5
    assert stream_seed("a", 1) != stream_seed("a", 2)


def test_problems_are_unique_and_exclude_files(tmp_path: Path) -> None:
    first = tmp_path / "first.jsonl"
    synthesize_to_file("problems", request("problems", count=200), str(first))
    used = [query_text(record) for record in read_records(first, "problem")]
    assert len(set(used)) == 200
    fresh = synthesize("problems", request("problems", count=200, exclude=(str(first),)))
    assert not set(used) & {query_text(record) for record in fresh}


def test_problem_answers_pass_the_verifier() -> None:
    records = list(synthesize("problems", request("problems", count=60)))
    with AnswerVerifier() as verifier:
        assert all(verifier.right([response_input(record, "", record["answer"]) for record in records]))
        wrong = [response_input(record, "", record["answer"].replace("1", "2") + "3") for record in records]
        assert not any(verifier.right(wrong))


def test_a_task_whose_scorer_cannot_tell_right_from_wrong_is_refused() -> None:
    (board,) = synthesize("problems", SynthesisRequest(count=1, tasks=("arc_agi",)))
    check_scorer(board, board["answer"])
    with pytest.raises(UserError, match="task arc_agi: its scorer counts its own answer .* as wrong"):
        check_scorer(board | {"metadata": board["metadata"] | {"output": [[10]]}}, board["answer"])
    (halting,) = synthesize("problems", SynthesisRequest(count=1, tasks=("game_of_life_halting",)))
    with pytest.raises(UserError, match="task game_of_life_halting: its scorer counts the answer '\\?' as right"):
        check_scorer(halting | {"answer": "?"}, None)


@pytest.mark.parametrize("task", sorted(synthesis_problems._IN_PARTS))
def test_tasks_that_refuse_an_endless_stream_go_on_after_a_part(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis_problems, "_PART_LENGTH", 3)
    records = list(synthesize("problems", SynthesisRequest(count=7, tasks=(task,))))
    assert len({record["messages"][0]["content"] for record in records}) == 7
    assert records == list(synthesize("problems", SynthesisRequest(count=7, tasks=(task,))))


def test_exhausted_task_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    tiny = request("problems", count=500, tasks=("chain_sum",), options={"max_digits": 1, "max_terms": 2})
    with pytest.raises(UserError, match="no further distinct train problems after"):
        synthesize_to_file("problems", tiny, str(out))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("chain_sun",)}, "did you mean 'chain_sum'"),
        ({"options": {"chain_sum.max_digit": 2}}, "did you mean 'max_digits'"),
        ({"options": {"max_digitz": 2}}, "did you mean 'max_digits'"),
        ({"options": {"chain_sum.min_digits": 0}}, "refuses its options"),
        ({"options": {"products.digits": "2y1"}, "tasks": ("products",)}, "like 2x1"),
        ({"options": {"style": "long"}}, "original or short"),
        ({"count": 0}, "count is 0"),
        ({"split": "test"}, "train, held_out"),
    ],
)
def test_bad_requests(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(synthesize("problems", request("problems", **({"options": {}} | changes))))


def test_worked_steps_text_holds_the_cold_start_wording() -> None:
    options = SMALL | {"problems_per_document": 2, "drill_share": 0.0}
    text = "\n".join(r["text"] for r in synthesize("worked_steps", request("worked_steps", options=options)))
    sound = SMALL | dict.fromkeys(
        ("wrong_answer", "repetition", "guessing", "disagreement", "language_mixing", "held_out_similarity"), 0.0
    )
    candidates = list(synthesize("reasoning_candidates", request("reasoning_candidates", options=sound)))
    thinking = {r["messages"][-1]["reasoning_content"] for r in candidates}
    assert sum(chain in text for chain in thinking) >= 30


@pytest.mark.parametrize(
    "task, options, drilled",
    [
        ("chain_sum", {}, {"+", "-"}),
        ("products", {}, {"*"}),
        ("basic_arithmetic", {"operators": ["+"], "allow_parentheses": False, "allow_negation": False}, {"+"}),
        ("gcd", {}, set()),
    ],
)
def test_drills_practise_the_operators_that_are_asked_for(task: str, options: dict, drilled: set[str]) -> None:
    scoped = {f"{task}.{name}": value for name, value in options.items()}
    wanted = request("worked_steps", count=30, tasks=(task,), options={"drill_share": 0.9} | scoped)
    texts = [record["text"] for record in synthesize("worked_steps", wanted)]
    drills = [text for text in texts if text[0].isdigit()]
    assert {line[1] for text in drills for line in text.splitlines()} == drilled
    assert bool(drills) == bool(drilled) and len(drills) < len(texts)


def test_dialogs_mix_general_and_reasoning_tasks() -> None:
    mixed = request("dialogs", tasks=("word_count", "chain_sum"), options={"chain_sum.max_digits": 2, "max_words": 4})
    records = list(synthesize("dialogs", mixed))
    assert {record["task"] for record in records} == {"word_count", "chain_sum"}
    assert all(record["mode"] == "no_think" for record in records)
    assert not any("reasoning_content" in message for record in records for message in record["messages"])


def test_dialogs_with_thinking_show_it_in_the_last_turn_alone() -> None:
    wanted = request("dialogs", tasks=("mode_flags", "judged_qa"), options={"thinking": True})
    for record in synthesize("dialogs", wanted):
        *earlier, answer = record["messages"]
        assert record["mode"] == "think" and answer["content"] in answer["reasoning_content"]
        assert not any("reasoning_content" in message for message in earlier)
    for task, reason in (("word_count", "no thinking to show"), ("chain_sum", "answered directly")):
        with pytest.raises(UserError, match=reason):
            list(synthesize("dialogs", request("dialogs", tasks=(task,), options={"thinking": True})))


def test_preferences_with_and_without_reference() -> None:
    records = list(synthesize("preferences", request("preferences", count=100)))
    with_reference = [record for record in records if "reference" in record]
    assert 30 <= len(with_reference) <= 70
    assert all((record["task"] == "preference") == ("reference" not in record) for record in records)


def test_parse_options() -> None:
    assert parse_options(["a=2", "b.c=x", "d=true"]) == {"a": 2, "b.c": "x", "d": True}
    with pytest.raises(UserError, match="name=value"):
        parse_options(["a"])


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen3_lit.curation.jsonl_output.os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        synthesize_to_file("problems", request("problems"), str(tmp_path / "out.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_metadata_survives_json() -> None:
    for record in synthesize("problems", request("problems")):
        assert json.loads(json.dumps(record))["metadata"]["source_dataset"] == record["task"]
