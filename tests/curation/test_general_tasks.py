import random
from collections import Counter

import pytest

from qwen3_lit.curation.general_tasks import GeneralOptions, load_general_tasks
from qwen3_lit.curation.general_tasks_words import phrase
from qwen3_lit.curation.synthesis import SynthesisRequest, synthesize
from qwen3_lit.curation.verification import AnswerVerifier, response_input
from qwen3_lit.data.chat_template import requested_mode
from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.instruction_checks import check_holds

TASKS = sorted(load_general_tasks())
BY_RULE = [task for task in TASKS if task not in ("preference", "calculator_tool")]


def test_there_are_enough_tasks() -> None:
    assert len(TASKS) >= 12


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("options", [GeneralOptions(), GeneralOptions(12, 6, 6, 5, 5, 0.5)])
def test_gold_holds_and_wrong_does_not(task: str, options: GeneralOptions) -> None:
    rng = random.Random(task)
    for _ in range(60):
        item = load_general_tasks()[task](rng, options)
        checks = item.metadata.get("checks", [])
        assert all(check_holds(item.gold, check) for check in checks)
        assert item.wrong and item.wrong != item.gold
        if checks and task != "word_mapping":
            assert not all(check_holds(item.wrong, check) for check in checks)
        assert item.messages[-1]["role"] == "user"


def test_answers_fit_small_models() -> None:
    rng = random.Random(0)
    for task in TASKS:
        for _ in range(40):
            assert len(load_general_tasks()[task](rng, GeneralOptions()).gold.split()) <= 25


@pytest.mark.parametrize("count", range(1, 15))
def test_phrase_has_the_count(count: int) -> None:
    rng = random.Random(count)
    assert {len(phrase(rng, "dog", count).split()) for _ in range(50)} == {count}


def test_gold_answers_pass_the_rewards_and_wrong_ones_fail() -> None:
    rng = random.Random(1)
    good, bad = [], []
    for task in BY_RULE:
        for _ in range(8):
            item = load_general_tasks()[task](rng, GeneralOptions())
            problem = {
                "messages": item.messages,
                "answer": item.gold if item.reference is None else item.reference,
                "task": task,
                "metadata": item.metadata,
            }
            good.append(response_input(problem, "", item.gold))
            bad.append(response_input(problem, "", str(item.wrong)))
    with AnswerVerifier() as verifier:
        assert all(verifier.right(good))
        assert not any(verifier.right(bad))


def test_calculator_dialog_is_scored_right_only_with_the_call() -> None:
    item = load_general_tasks()["calculator_tool"](random.Random(0), GeneralOptions())
    problem = {"messages": item.messages, "answer": item.gold, "task": "calculator_tool", "tools": item.tools}
    call = (
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+1"}}\n</tool_call>'
    )
    turns = [{"role": "assistant", "content": call}, item.tool_turns[1], {"role": "assistant", "content": item.gold}]
    with AnswerVerifier() as verifier:
        with_call = response_input(problem, "", item.gold, turns)
        assert verifier.right([with_call, response_input(problem, "", item.gold)]) == [True, False]


def test_last_flag_decides_the_mode_and_both_modes_occur() -> None:
    request = SynthesisRequest(count=120, tasks=("mode_flags",))
    modes: Counter[str] = Counter()
    turns: Counter[int] = Counter()
    for record in synthesize("general_problems", request):
        assert requested_mode(record["messages"]) == record["mode"]
        modes[record["mode"]] += 1
        turns[len(record["messages"])] += 1
    assert min(modes["think"], modes["no_think"]) >= 40
    assert set(turns) == {1, 3, 5}
    for record in synthesize("dialogs", request):
        assert requested_mode(record["messages"]) is None


def test_problems_without_a_mode_may_ask_for_no_thinking() -> None:
    request = SynthesisRequest(count=200, tasks=("word_count", "mode_flags"), options={"no_think_share": 0.5})
    modes: Counter[str | None] = Counter()
    for record in synthesize("general_problems", request):
        assert requested_mode(record["messages"]) == record.get("mode")
        if record["task"] == "word_count":
            modes[record.get("mode")] += 1
    assert set(modes) == {"no_think", None} and min(modes.values()) >= 30


def test_grounded_questions_are_partly_unanswerable() -> None:
    request = SynthesisRequest(count=200, tasks=("grounded_qa",))
    records = list(synthesize("general_problems", request))
    for record in records:
        stated = record["answer"] in record["metadata"]["context"]
        assert stated == record["metadata"]["answerable"] == (record["answer"] != "not stated")
    assert 30 <= sum(not record["metadata"]["answerable"] for record in records) <= 90


def test_options_are_checked() -> None:
    for options, message in (
        ({"max_word": 3}, "did you mean 'max_words'"),
        ({"max_words": 0}, "1 or more"),
        ({"context_facts": 9}, "at most 8"),
    ):
        with pytest.raises(UserError, match=message):
            list(synthesize("general_problems", SynthesisRequest(count=1, options=options)))
