"""Each rule reward says yes to what it should, and no to the ways a policy would cheat it."""

import json
import pickle
import time
from typing import Any

import pytest
import reasoning_gym

from qwen3_lit.curation.general_tasks import general_problem_records
from qwen3_lit.curation.synthesis import SynthesisRequest
from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.final_answer import last_boxed
from qwen3_lit.rl.rewards.format import FormatReward
from qwen3_lit.rl.rewards.grounded import GroundedReward
from qwen3_lit.rl.rewards.instruction import InstructionReward
from qwen3_lit.rl.rewards.instruction_checks import CHECKS, check_holds, describe_check
from qwen3_lit.rl.rewards.length import LengthReward
from qwen3_lit.rl.rewards.math_answer import MathAnswerReward
from qwen3_lit.rl.rewards.mode_follow import ModeFollowReward
from qwen3_lit.rl.rewards.reasoning_gym_answer import ReasoningGymAnswerReward
from qwen3_lit.rl.rewards.reward import Reward, RewardInput, check_rewards, combine_scores
from qwen3_lit.rl.rewards.tool_use import ToolUseReward


def given(
    text: str,
    *,
    thinking: str | None = None,
    completion: str | None = None,
    turns: list[dict[str, str]] | None = None,
    num_tokens: int = 0,
    prompt: str = "question",
    **problem: object,
) -> RewardInput:
    whole = completion if completion is not None else f"<think>\n{thinking or ''}\n</think>\n\n{text}"
    return RewardInput(
        messages=[{"role": "user", "content": prompt}],
        completion=whole,
        thinking=thinking,
        answer=text,
        problem=problem,
        num_tokens=num_tokens,
        turns=turns if turns is not None else [{"role": "assistant", "content": whole}],
    )


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("\\boxed{42}", "42", True),
        ("so it is \\boxed{41}, no, \\boxed{42}", "42", True),
        ("\\boxed{42} or maybe \\boxed{43}", "42", False),
        ("the sum is 1,042.", "1042", True),
        ("the answer is 42", "42", True),
        ("42 is wrong, it is 43", "42", False),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("\\boxed{x^2+2x+1}", "(x+1)^2", True),
        ("\\boxed{x^2+2x}", "(x+1)^2", False),
        ("\\boxed{\\{1,2\\}}", "$\\{2,1\\}$", True),
        ("\\boxed{-0.50}", "-1/2", True),
        ("", "42", False),
        ("no idea", "42", False),
        ("1 2 3 4 5 6 7 8 9", "4", False),
        ("\\boxed{" + "1+" * 400 + "1}", "401", False),
        # A comma that groups no thousands separates.
        ("\\boxed{12}", "1,2", False),
        ("The answer is 35.", "3,5", False),
        ("The answer is 3, 5.", "3,5", True),
        ("\\boxed{3, 5}", "3,5", True),
        ("The answer is 3,5.", "5", False),
        ("\\boxed{12,34}", "1234", False),
        ("The answer is 1234.", "1,234", True),
        # An expression is worth its value, not its last number, and a remark behind an answer nothing.
        ("The answer is $\\frac{1}{2}$.", "1/2", True),
        ("The answer is $\\frac{1}{2}$.", "2", False),
        ("$2^{10}$", "1024", True),
        ("The answer is $2^{10}$.", "10", False),
        ("The answer is 3 + 4.", "4", False),
        ("The answer is 2**10", "10", False),
        ("12 (3 rows of 4).", "12", True),
        ("The answer is 12 (3 rows of 4).", "4", False),
        ("3 + 4 = 7", "7", True),
        ("The answer is **7**.", "7", True),
        ("We have $x^2 = 49$, so x = 7 apples", "7", True),
        # What is announced counts, not what else the text mentions.
        ("4 or $\\frac{1}{2}$?\nThe answer is $3$.", "1/2", False),
        ("The answer is 3\nas $x = \\frac{1}{2}$ shows", "1/2", False),
    ],
)
def test_math_answer(text: str, reference: str, right: bool) -> None:
    assert MathAnswerReward()(given(text, answer=reference)) == float(right)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("17*23", "391"),
        ("17 \\cdot 23", "391"),
        ("391 = 17 \\times 23", "391"),
        ("391/17", "23"),
        ("\\frac{391}{17}", "23"),
        ("17\\frac{23}{1}", "40"),
        ("2+3", "5"),
        ("1+2, 5", "3,5"),
        ("\\frac{1}{4}+\\frac{1}{4}", "\\frac{1}{2}"),
        ("\\sqrt{144}", "12"),
        ("5!", "120"),
        ("\\gcd(12, 18)", "6"),
        ("\\binom{10}{3}", "120"),
        ("\\sum_{k=1}^{10}k", "55"),
        ("\\int_0^1 x dx", "1/2"),
        ("\\int_0^1 x dx", "$\\frac{1}{2}$"),
        ("\\int_0^\\pi \\frac{1}{4} dx", "\\frac{\\pi}{4}"),
    ],
)
def test_math_answer_pays_nothing_for_the_question_once_more(answer: str, reference: str) -> None:
    for text in (f"\\boxed{{{answer}}}", f"So it is ${answer}$.", f"The answer is {answer}"):
        assert MathAnswerReward()(given(text, answer=reference)) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("17*23 = 391", "391"),
        ("x = 391", "391"),
        ("x \\approx -3.5", "-7/2"),
        ("3\\times 10^8", "300000000"),
        ("2^{10}", "1024"),
        ("(-2)^3", "-8"),
        ("\\dfrac{3}{8}", "0.375"),
        ("-\\frac12", "-1/2"),
        ("3\\frac{1}{2}", "3.5"),
        ("50\\%", "50"),
        ("50\\%", "0.5"),
        ("42\\text{ cm}", "42"),
        ("42\\ \\mathrm{m/s^2}", "42"),
        ("42^\\circ", "42"),
        ("\\$42", "42"),
        ("\\(42\\)", "42"),
        ("\\text{42}", "42"),
        ("1{,}000", "1000"),
        ("x = 3, y = 5", "3,5"),
        ("\\left(\\frac{1}{2}, 3\\right)", "(0.5, 3)"),
        ("\\sqrt{12}", "2\\sqrt{3}"),
        ("\\lim_{n} a_n", "\\lim_{n} a_n"),
    ],
)
def test_math_answer_accepts_a_value_in_each_of_its_spellings(answer: str, reference: str) -> None:
    assert MathAnswerReward()(given(f"\\boxed{{{answer}}}", answer=reference)) == 1.0


def test_a_power_is_no_answer_where_the_question_asks_for_its_value() -> None:
    reward = MathAnswerReward()
    assert reward(given("\\boxed{2^{10}}", prompt="How many subsets have 10 elements?", answer="1024")) == 1.0
    assert reward(given("\\boxed{2^{10}}", prompt="What is 2 to the power of 10?", answer="1024")) == 0.0


def test_math_answer_does_not_apply_without_a_reference() -> None:
    for answer in ("", " ", None):
        assert MathAnswerReward()(given("\\boxed{}", answer=answer)) is None


def test_finding_the_last_box_takes_linear_time() -> None:
    assert last_boxed("\\boxed{1} \\boxed{2 {3} \\boxed{4{5}} }} \\boxed{6") == "4{5}"
    started = time.process_time()
    assert last_boxed("\\boxed{" * 40_000) is None
    assert time.process_time() - started < 2


def test_math_answer_reads_only_the_end_and_may_insist_on_a_box() -> None:
    assert MathAnswerReward(max_chars=50)(given("\\boxed{42}" + " " * 60, answer="42")) == 0.0
    assert MathAnswerReward(require_boxed=True)(given("the answer is 42", answer="42")) == 0.0


@pytest.mark.parametrize(
    "task",
    ["chain_sum", "countdown", "number_sorting", "word_sorting", "propositional_logic", "arc_agi", "rearc"]
    + ["game_of_life_halting", "prime_factorization"],
)
def test_reasoning_gym_scores_with_the_tasks_own_scorer(task: str) -> None:
    entry = reasoning_gym.create_dataset(task, seed=3, size=1)[0]
    # Problems travel as JSONL.
    entry = json.loads(json.dumps(entry))
    gold = entry["answer"] or entry["metadata"]["example_answer"]
    problem = {"answer": entry["answer"], "metadata": entry["metadata"]}
    reward = ReasoningGymAnswerReward()
    assert reward(given(f"<answer>{gold}</answer>", prompt=entry["question"], **problem)) == 1.0
    assert reward(given("Answer: pardon", prompt=entry["question"], **problem)) == 0.0


def test_reasoning_gym_gives_no_credit_for_listing_candidates() -> None:
    entry = reasoning_gym.create_dataset("chain_sum", seed=3, size=1)[0]
    listing = " ".join(str(value) for value in range(-2000, 2000))
    problem = {"answer": entry["answer"], "metadata": entry["metadata"]}
    assert ReasoningGymAnswerReward()(given(listing, **problem)) == 0.0


def test_reasoning_gym_does_not_apply_to_other_problems() -> None:
    assert ReasoningGymAnswerReward()(given("1", answer="1")) is None
    assert ReasoningGymAnswerReward()(given("1", answer="1", metadata={"source_dataset": "no_such_dataset"})) is None


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        ("<think>\nhm\n</think>\n\n4", True),
        ("<think>\n\n</think>\n\n4", True),
        ("4", False),
        ("<think>\nhm\n</think>\n\n", False),
        ("<think>\nhm", False),
        ("hm</think>4", False),
        ("x<think>\nhm\n</think>\n\n4", False),
        ("<think>a</think>b<think>c</think>4", False),
        ("</think><think>4", False),
        ("<think><think>a</think>4", False),
    ],
)
def test_format(text: str, well_formed: bool) -> None:
    assert FormatReward()(given("", completion=text)) == float(well_formed)


@pytest.mark.parametrize(
    ("mode", "thinking", "score"),
    [
        ("think", "so 2+2", 1.0),
        ("think", " \n", 0.0),
        ("think", None, 0.0),
        ("no_think", "", 1.0),
        ("no_think", None, 1.0),
        ("no_think", "psst", 0.0),
    ],
)
def test_mode_follow(mode: str, thinking: str | None, score: float) -> None:
    assert ModeFollowReward()(given("4", thinking=thinking, mode=mode)) == score


EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("mode", "texts", "score"),
    [
        ("no_think", [f"{EMPTY}<think>\nLet me really think\n</think>\n\n7"], 0.0),
        ("no_think", [f"{EMPTY}Let me really think\n</think>\n\n7"], 0.0),
        ("no_think", [f"{EMPTY}7<think>"], 0.0),
        ("no_think", ["<think>\nlong\n</think>\n\n<tool_call>", f"{EMPTY}7"], 0.0),
        ("no_think", [f"{EMPTY}<tool_call>", f"{EMPTY}7"], 1.0),
        ("no_think", ["<tool_call>", "7"], 1.0),
        ("think", ["<think>\nlong\n</think>\n\n<tool_call>", f"{EMPTY}7"], 1.0),
        ("think", ["the prompt has opened it</think>7"], 1.0),
        ("think", ["<think>\nstill at it"], 1.0),
        ("think", [f"{EMPTY}<tool_call>", f"{EMPTY}7"], 0.0),
    ],
)
def test_mode_follow_reads_every_block_of_every_turn(mode: str, texts: list[str], score: float) -> None:
    result = {"role": "tool", "content": "a tool may write <think> what it likes </think>"}
    turns = [entry for text in texts for entry in ({"role": "assistant", "content": text}, result)][:-1]
    assert ModeFollowReward()(given("7", thinking="", turns=turns, mode=mode)) == score


def test_mode_follow_needs_a_commanded_mode() -> None:
    assert ModeFollowReward()(given("4", thinking="x")) is None


CASES = {
    "exact_words": ({"count": 3}, "one two-fold three.", "one two"),
    "min_words": ({"count": 2}, "one two", "one"),
    "max_words": ({"count": 2}, "one two", "one two three"),
    "exact_sentences": ({"count": 2}, "Pi is 3.14. Yes!", "Pi is 3.14. Yes! No"),
    "include_word": ({"word": "cat", "count": 2}, "Cat and cat", "cat concatenate"),
    "exact_word_count": ({"word": "cat", "count": 1}, "a cat", "cat cat"),
    "forbid_word": ({"word": "cat"}, "concatenate", "a Cat."),
    "all_upper": ({}, "A B 1", "A b"),
    "all_lower": ({}, "a b 1", "A b"),
    "starts_with": ({"text": "Dear"}, "Dear all", "dear all"),
    "ends_with": ({"text": "end."}, "the end.", "the end"),
    "json_object": ({"keys": ["a", "b"]}, '```json\n{"a": 1, "b": []}\n```', '{"a": 1}'),
    "separated_list": ({"count": 3, "separator": ";"}, "a; b;c", "a;b; "),
    "bullet_list": ({"count": 2}, "- a\n- b", "- a\n-b"),
    "numbered_list": ({"count": 2}, "1. a\n2. b", "1. a\n3. b"),
    "boxed": ({}, "\\boxed{4}", "\\boxed{}"),
    "no_commas": ({}, "a b", "a, b"),
    "quoted": ({}, '"a"', '"a'),
    "title": ({}, "<<My title>>\ntext", "<< >> text"),
    "paragraphs": ({"count": 2}, "a\n\nb", "a\nb"),
    "one_of": ({"options": ["yes", "no"]}, " yes ", "yes and no"),
    "repeat_word": ({"word": "ha", "count": 3}, "ha ha ha", "ha ha"),
    "postscript": ({}, "text\nP.S. more", "text P.S."),
    "no_digits": ({}, "four", "4"),
}


def test_every_instruction_check_is_covered() -> None:
    assert set(CASES) == set(CHECKS)


@pytest.mark.parametrize("name", sorted(CASES))
def test_instruction_checks(name: str) -> None:
    parameters, good, bad = CASES[name]
    spec = {"name": name, **parameters}
    assert check_holds(good, spec)
    assert not check_holds(bad, spec)
    assert not check_holds("", spec)
    assert "{" not in describe_check(spec).replace("\\boxed{}", "")


def test_instruction_is_strict_unless_told_otherwise() -> None:
    checks = [{"name": "all_lower"}, {"name": "max_words", "count": 1}]
    assert InstructionReward()(given("two words", metadata={"checks": checks})) == 0.0
    assert InstructionReward(partial=True)(given("two words", metadata={"checks": checks})) == 0.5
    assert InstructionReward()(given("two words")) is None
    with pytest.raises(UserError, match="unknown check 'nope'"):
        InstructionReward()(given("x", metadata={"checks": [{"name": "nope"}]}))
    with pytest.raises(UserError, match="takes the parameters"):
        check_holds("x", {"name": "max_words"})


def _call(expression: str) -> str:
    return f'<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "{expression}"}}}}\n</tool_call>'


def _dialog(first: str, last: str, *results: str) -> list[dict[str, str]]:
    return [
        {"role": "assistant", "content": first},
        *({"role": "tool", "content": result} for result in results or ("12",)),
        {"role": "assistant", "content": last},
    ]


@pytest.mark.parametrize(
    ("turns", "score"),
    [
        (_dialog(_call("3*4"), "It is 12."), 1.0),
        (_dialog(_call("3*4"), "It is 13."), 0.0),
        (_dialog("<tool_call>3*4</tool_call>", "It is 12."), 0.0),
        (_dialog(_call("3*4").replace("calculator", "search"), "It is 12."), 0.0),
        ([{"role": "assistant", "content": "It is 12."}], 0.0),
        ([{"role": "assistant", "content": _call("3*4") + " It is 12."}], 0.0),
        (_dialog("<think>\n" + _call("3*4") + "\n</think>\n\nno call", "It is 12."), 0.0),
        (_dialog(_call("3*"), "It is 12.", "error: not an arithmetic expression"), 0.0),
        (_dialog(_call("3*") + _call("3*4"), "It is 12.", "error: not an arithmetic expression", "12"), 1.0),
        (_dialog(_call("3*") + _call("3*4").replace("calculator", "search"), "It is 12.", "error: no", "12"), 0.0),
        (_dialog(_call("3*"), "", "error: no")[:-1] + _dialog(_call("3*4"), "It is 12."), 1.0),
        (_dialog(_call("3*4"), _call("3*4") + " It is 12."), 0.0),
        (_dialog(_call("3*4"), "It is 12. <tool_call>3*4"), 0.0),
    ],
)
def test_tool_use_needs_an_executed_call_and_the_right_answer(turns: list[dict[str, str]], score: float) -> None:
    reward = ToolUseReward()
    problem = {"answer": "12", "metadata": {"tool": "calculator"}}
    assert reward(given(turns[-1]["content"], turns=turns, **problem)) == score


CONTEXT = "The tower of Aldmoor was built in 1412 by Ines Vark. It has 96 steps."


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("It was built in 1412.", "1412", 1.0),
        ("It was built in 14120.", "1412", 0.0),
        ("It is not stated.", "1412", 0.0),
        ("Not stated.", "not stated", 1.0),
        ("It was Ines Vark.", "not stated", 0.0),
        ("1412, during the famous dragon wars", "1412", 1 / 5),
        ("The tower was built in 1412.", "1412", 2 / 3),
        (CONTEXT, "1412", 2 / 8),
        (CONTEXT + " Or not stated.", "not stated", 1 / 8),
        ("It was not 1412.", "1412", 0.0),
        ("It wasn't 1412.", "1412", 0.0),
        ("It was not 1410 but 1412.", "1412", 1 / 2),
        ("It is not not stated.", "not stated", 0.0),
        ("It is not in the text, so not stated.", "not stated", 1.0),
    ],
)
@pytest.mark.parametrize("given_context", ["{} When was it built?", "Text:\n\n  {}\n\nWhen was it built?"])
def test_grounded(answer: str, reference: str, score: float, given_context: str) -> None:
    prompt = given_context.format(CONTEXT.replace(" ", "\n"))
    item = given(answer, prompt=prompt, answer=reference, metadata={"context": CONTEXT})
    assert GroundedReward()(item) == pytest.approx(score)


def test_a_copied_context_is_no_answer_to_a_synthetic_question() -> None:
    problems = list(general_problem_records(SynthesisRequest(count=200, tasks=("grounded_qa",))))
    reward = GroundedReward()

    def score(problem: dict[str, Any], answer: str) -> float:
        return reward(given(answer, prompt=problem["messages"][0]["content"], **problem)) or 0.0

    context = [score(problem, problem["metadata"]["context"]) for problem in problems]
    assert all(score(problem, problem["answer"]) == 1.0 for problem in problems)
    assert max(context) < 0.5 and sum(context) / len(context) < 0.3


def test_overlong_penalty_follows_dapo() -> None:
    reward = LengthReward(max_tokens=100, cache_tokens=20)
    assert [reward(given("", num_tokens=n)) for n in (10, 80, 90, 100, 500)] == [0.0, 0.0, -0.5, -1.0, -1.0]


class _Fixed(Reward):
    def score(self, item: RewardInput) -> float:
        return 1.0


def test_composition_leaves_out_what_does_not_apply() -> None:
    rewards = [_Fixed(2.0, name="a"), _Fixed(1.0, name="b"), _Fixed(0.0, name="c")]
    assert combine_scores({"a": 1.0, "b": 0.0, "c": 9.0}, rewards) == pytest.approx(2 / 3)
    assert combine_scores({"a": None, "b": 0.5, "c": 9.0}, rewards) == 0.5
    assert combine_scores({"a": 1.0, "b": -0.5, "c": None}, rewards, "sum") == 1.5
    assert combine_scores({"a": None, "b": None, "c": 1.0}, rewards) is None


def _problem(task: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "?"}], "task": task, **fields}


def test_a_task_whose_content_no_reward_judges_is_found_before_the_run() -> None:
    check_rewards([_Fixed(tasks=["x"], name="a")], [_problem("x")])
    with pytest.raises(UserError, match="problem 2, of task 'y'"):
        check_rewards([_Fixed(tasks=["x"], name="a"), _Fixed(0.0, name="free")], [_problem("x"), _problem("y")])
    form = [FormatReward(), ModeFollowReward(), LengthReward(8, 4)]
    with pytest.raises(UserError, match="problem 1, of task 'x'.*no weighted reward judges the content"):
        check_rewards(form, [_problem("x", answer="4", mode="think")])
    math = [*form, MathAnswerReward()]
    check_rewards(math, [_problem("x", answer="4")])
    with pytest.raises(UserError, match="problem 1, of task 'x'.*`answer`"):
        check_rewards(math, [_problem("x")])


def test_a_task_that_no_problem_has_is_refused() -> None:
    rewards = [_Fixed(tasks=["x", "z"], name="a")]
    with pytest.raises(UserError, match="a: tasks: no problem has the task 'z'; the problems' tasks are x, y"):
        check_rewards([*rewards, _Fixed(name="b")], [_problem("x"), _problem("y")])
    check_rewards(rewards, [_problem("x")], {"z"})


def test_long_inputs_keep_the_end_of_the_answer_and_both_ends_of_the_completion() -> None:
    item = given("x" * 1000 + "\\boxed{4}", thinking="t" * 1000).capped(100)
    assert len(item.completion) == len(item.answer) == len(item.thinking or "") == 100
    assert item.answer.endswith("\\boxed{4}") and item.completion.startswith("<think>")


def test_rule_rewards_pickle() -> None:
    for reward in (MathAnswerReward(), ReasoningGymAnswerReward(), InstructionReward(), LengthReward(8, 4)):
        assert pickle.loads(pickle.dumps(reward)).name == reward.name
