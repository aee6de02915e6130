"""Text from a model is evaluated exactly, or refused; it never runs and never hangs."""

import pytest

from qwen3_lit.rl.calculator import CalculatorError, evaluate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3 + 4 * 2", "11"),
        (" (1 + 2) ** 3 ", "27"),
        ("7 // 2 - 7 % 4", "0"),
        ("-7 // 2", "-4"),
        ("1 / 3", "0.3333333333"),
        ("0.1 + 0.2", "0.3"),
        ("2 ** -2", "0.25"),
        ("123456789 * 987654321", "121932631112635269"),
        ("10 / 5", "2"),
        ("-1 / 3", "-0.3333333333"),
        ("-1 / 10 ** 20", "0"),
        ("(10 ** 150 + 1) / 2", "5" + "0" * 149 + ".5"),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "1 / 0",
        "9 ** 9 ** 9",
        "2 ** 100000",
        "(-8) ** 0.5",
        "__import__('os').system('true')",
        "[1] * 10",
        "'a' * 3",
        "True + 1",
        "1e308 * 10 ** 900",
        "x + 1",
        "",
        "1 +",
        "(" * 150,
        "1 + " * 60 + "1",
        "0 ** -1",
        "1\0",
        "1j",
    ],
)
def test_refusals(expression: str) -> None:
    with pytest.raises(CalculatorError):
        evaluate(expression)
