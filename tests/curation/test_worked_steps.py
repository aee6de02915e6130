import random

import pytest
import reasoning_gym

from qwen3_lit.curation.synthesis import SynthesisRequest, synthesize
from qwen3_lit.curation.worked_steps import WORKED_STEPS, solve
from qwen3_lit.curation.worked_steps_arithmetic import (
    addition_lines,
    careless_sum_lines,
    drill_line,
    multiplication_lines,
    subtraction_lines,
)
from qwen3_lit.errors import UserError


def evaluate_line(line: str) -> bool:
    """Whether every equation of a column line is true."""
    parts = line.split("=")
    if len(parts) == 2:  # 7+8+0=15 or 7-8-0=b1 9
        borrow, _, written = parts[1].rpartition(" ")
        return eval(parts[0]) == int(written) - (10 * int(borrow[1:]) if borrow else 0)
    first, second, total = parts  # 4*8=32+5=37
    product, carry = second.split("+")
    return eval(first) == int(product) and int(product) + int(carry) == int(total)


@pytest.mark.parametrize("seed", range(20))
def test_every_column_is_true_and_the_result_is_right(seed: int) -> None:
    rng = random.Random(seed)
    left, right = rng.randint(0, 10 ** rng.randint(1, 6)), rng.randint(0, 10 ** rng.randint(1, 6))
    for lines, result, expected in (
        (*addition_lines(left, right), left + right),
        (*subtraction_lines(left, right), left - right),
        (*multiplication_lines(left, right), left * right),
    ):
        assert result == expected and lines[-1] == str(expected)
        columns = [line for line in lines if line[1:2] in ("+", "-", "*") and "=" in line]
        assert columns and all(evaluate_line(line) for line in columns)


@pytest.mark.parametrize("operator", ["+", "-", "*"])
def test_drills_are_true_and_cover_the_table(operator: str) -> None:
    rng = random.Random(0)
    lines = [drill_line(operator, rng) for _ in range(2000)]
    assert all(evaluate_line(line) for line in lines)
    assert len({line[:3] for line in lines}) >= 100


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("basic_arithmetic", {"operators": ["+", "-"], "allow_parentheses": False, "allow_negation": False}),
        ("chain_sum", {"max_terms": 6, "max_digits": 5, "allow_negation": True}),
        ("products", {"max_terms": 4, "max_digits": 4, "allow_negation": True}),
        ("gcd", {"max_numbers": 4}),
        ("number_sorting", {}),
        ("count_bits", {}),
        ("letter_counting", {}),
        ("spell_backward", {}),
    ],
)
def test_solutions_pass_the_tasks_own_scorer(task: str, options: dict) -> None:
    dataset = reasoning_gym.create_dataset(task, seed=3, size=60, **options)
    for entry in dataset:
        solution = solve(task, entry)
        assert dataset.score_answer(solution.answer, entry) == 1.0
        assert solution.thinking.endswith(solution.answer)


def test_every_solver_is_covered_above() -> None:
    assert set(WORKED_STEPS) == {
        "basic_arithmetic", "chain_sum", "products", "gcd", "number_sorting", "count_bits", "letter_counting",
        "spell_backward",
    }  # fmt: skip


def test_small_chains_stay_short() -> None:
    request = SynthesisRequest(
        count=300,
        tasks=("chain_sum", "products"),
        options={"chain_sum.max_terms": 2, "chain_sum.max_digits": 2, "products.digits": "2x1", "unique": False},
    )
    for record in synthesize("problems", request):
        entry = {"question": "", "answer": record["answer"], "metadata": record["metadata"]}
        # Digits, operators and line ends are one token each, so characters bound the tokens.
        assert len(solve(record["task"], entry).thinking) <= 60


def test_disagreement_with_the_entry_is_an_error() -> None:
    entry = {"question": "1 + 1", "answer": "3", "metadata": {"expression": "1 + 1"}}
    with pytest.raises(ValueError, match="end in '2'"):
        solve("chain_sum", entry)
    with pytest.raises(UserError, match="no worked steps"):
        solve("sudoku", entry)


def test_careless_columns_are_right_where_nothing_is_carried_or_borrowed() -> None:
    right = {
        expression: careless_sum_lines({"metadata": {"expression": expression}})[-1] == str(eval(expression))
        for expression in ("12 + 34", "5 + 4", "78 - 50", "8 + 7", "54 - 66", "59 + 62", "1 + 2 + 3")
    }
    assert right == {
        "12 + 34": True,
        "5 + 4": True,
        "78 - 50": True,
        "8 + 7": False,
        "54 - 66": False,
        "59 + 62": False,
        "1 + 2 + 3": True,
    }


def test_other_operators_are_named_in_the_error() -> None:
    with pytest.raises(UserError, match=r"no worked steps for '4 / 2'.*operators"):
        solve("basic_arithmetic", {"question": "4 / 2", "answer": "2", "metadata": {"expression": "4 / 2"}})
