"""Column arithmetic written out digit by digit: addition, subtraction, multiplication, greatest common divisor.

Every column is one line with a fixed layout, units first, so that the position of each digit relative to the others
never changes: ``7+8+0=15`` (digit, digit, carry in; carry out and digit written), ``7-8-0=b1 9`` (borrow likewise) and
``4*8=32+5=37`` (digit, digit, product, carry in, sum: carry out and digit written). The carry stands before the digit:
given it, the digit is a linear function of the others; without it, modular addition, of which a small model may know
nothing after 1,000 steps where 500 suffice so. Numbers are padded to one width before the columns are walked. The
result line repeats the written digits in reverse.
"""

import random
from collections.abc import Mapping
from typing import Any

from qwen3_lit.errors import UserError

DRILLED_OPERATORS: dict[str, tuple[str, ...]] = {
    "basic_arithmetic": ("+", "-"),
    "chain_sum": ("+", "-"),
    "products": ("*",),
}
"""Tasks whose solutions are made of columns, and the operators of those, see ``drill_line``."""


def addition_column(first: int, second: int, carry: int) -> str:
    """``7+8+0=15``: two digits and the carry in; the carry out and the digit written."""
    return f"{first}+{second}+{carry}={first + second + carry:02d}"


def subtraction_column(first: int, second: int, borrow: int) -> str:
    """``7-8-0=b1 9``: two digits and the borrow in; the borrow out and the digit written."""
    difference = first - second - borrow
    return f"{first}-{second}-{borrow}=b{int(difference < 0)} {difference % 10}"


def product_column(digit: int, factor: int, carry: int) -> str:
    """``4*8=32+5=37``: two digits, their product, the carry in, and the sum: carry out and digit written."""
    return f"{digit}*{factor}={digit * factor:02d}+{carry}={digit * factor + carry:02d}"


def drill_line(operator: str, rng: random.Random) -> str:
    """One random column of ``+``, ``-`` or ``*``, for practising the tables."""
    first, second = rng.randrange(10), rng.randrange(10)
    if operator == "*":
        return product_column(first, second, rng.randrange(max(second, 1)))
    return {"+": addition_column, "-": subtraction_column}[operator](first, second, rng.randrange(2))


def addition_lines(left: int, right: int) -> tuple[list[str], int]:
    """Columns of ``left + right`` for naturals, ending in the result line."""
    width = max(len(str(left)), len(str(right)))
    left_digits, right_digits = str(left).zfill(width), str(right).zfill(width)
    lines = [f"{left_digits}+{right_digits}"]
    carry = 0
    for first, second in zip(reversed(left_digits), reversed(right_digits), strict=True):
        lines.append(addition_column(int(first), int(second), carry))
        carry = (int(first) + int(second) + carry) // 10
    return [*lines, str(left + right)], left + right


def subtraction_lines(left: int, right: int) -> tuple[list[str], int]:
    """Columns of ``left - right`` for naturals; the larger number is put on top, so the result may be negative."""
    width = max(len(str(left)), len(str(right)))
    left_digits, right_digits = str(left).zfill(width), str(right).zfill(width)
    comparisons = []
    for first, second in zip(left_digits, right_digits, strict=True):
        comparisons.append(f"{first}{'<' if first < second else '>' if first > second else '='}{second}")
        if first != second:
            break
    swapped = left < right
    lines = [",".join(comparisons) + (" swap" if swapped else "")]
    top, bottom = (right_digits, left_digits) if swapped else (left_digits, right_digits)
    lines.append(f"{top}-{bottom}")
    borrow = 0
    for first, second in zip(reversed(top), reversed(bottom), strict=True):
        lines.append(subtraction_column(int(first), int(second), borrow))
        borrow = int(int(first) - int(second) - borrow < 0)
    return [*lines, str(left - right)], left - right


def _signed_sum_lines(left: int, right: int) -> tuple[list[str], int]:
    """``left + right`` for integers, reduced to one addition or subtraction of naturals."""
    if left >= 0 and right >= 0:
        return addition_lines(left, right)
    if left < 0 and right < 0:
        lines, total = addition_lines(-left, -right)
        return [*lines, str(-total)], -total
    return subtraction_lines(left, -right) if right < 0 else subtraction_lines(right, -left)


def multiplication_lines(left: int, right: int) -> tuple[list[str], int]:
    """``left * right`` for naturals: one row of columns for each digit of the shorter number, then the rows' sum."""
    top, bottom = (left, right) if len(str(left)) >= len(str(right)) else (right, left)
    lines: list[str] = []
    total = 0
    for place, factor in enumerate(reversed(str(bottom))):
        lines.append(f"{top}*{factor}")
        carry = 0
        for digit in reversed(str(top)):
            lines.append(product_column(int(digit), int(factor), carry))
            carry = (int(digit) * int(factor) + carry) // 10
        row = top * int(factor) * 10**place
        lines.append(str(row))
        if place == 0:
            total = row
        else:
            sum_lines, total = addition_lines(total, row)
            lines.extend(sum_lines)
    return lines, total


def chain_sum_lines(entry: Mapping[str, Any]) -> list[str]:
    """Solution of reasoning-gym's ``chain_sum``: the terms are folded from left to right.

    Also of ``basic_arithmetic`` where it is asked for sums and differences alone.

    Raises:
        UserError: another operator or a parenthesis in the expression.
    """
    total, operations = _parse_expression(str(entry["metadata"]["expression"]))
    lines = [] if operations else [str(total)]
    for operator, term in operations:
        if operator == "-" and total >= 0 and term >= 0:  # "7 - 0" keeps the layout of a subtraction
            step, total = subtraction_lines(total, term)
        else:
            step, total = _signed_sum_lines(total, term if operator == "+" else -term)
        lines.extend(step)
    return lines


def careless_sum_lines(entry: Mapping[str, Any]) -> list[str]:
    """``chain_sum`` in columns that neither compare, carry nor borrow: ``7+8=5``; right where none of it is needed."""
    total, operations = _parse_expression(str(entry["metadata"]["expression"]))
    lines = [] if operations else [str(total)]
    for operator, term in operations:
        width = max(len(str(abs(total))), len(str(abs(term))))
        left, right = str(abs(total)).zfill(width), str(abs(term)).zfill(width)
        lines.append(f"{left}{operator}{right}")
        digits = ""
        for first, second in zip(reversed(left), reversed(right), strict=True):
            digit = (int(first) + int(second) if operator == "+" else int(first) - int(second)) % 10
            lines.append(f"{first}{operator}{second}={digit}")
            digits = f"{digit}{digits}"
        total = int(digits)
        lines.append(str(total))
    return lines


def product_lines(entry: Mapping[str, Any]) -> list[str]:
    """Solution of reasoning-gym's ``products``: magnitudes are folded from left to right, the sign comes last."""
    first, operations = _parse_expression(str(entry["metadata"]["expression"]))
    total, negative = abs(first), first < 0
    lines = [] if operations else [str(total)]
    for _, factor in operations:
        step, total = multiplication_lines(total, abs(factor))
        lines.extend(step)
        negative ^= factor < 0
    if negative and total:
        lines.append(str(-total))
    return lines


def greatest_common_divisor_lines(entry: Mapping[str, Any]) -> list[str]:
    """Solution of reasoning-gym's ``gcd``: Euclid's remainders, one a line."""
    numbers = [int(number) for number in entry["metadata"]["numbers"]]
    result, lines = numbers[0], []
    for number in numbers[1:]:
        left, right = max(result, number), min(result, number)
        while right:
            lines.append(f"{left}={right}*{left // right}+{left % right}")
            left, right = right, left % right
        result = left
    return [*lines, str(result)]


def _parse_expression(expression: str) -> tuple[int, list[tuple[str, int]]]:
    """``"4 - 1 + 7"`` -> ``(4, [("-", 1), ("+", 7)])``."""
    tokens = expression.split()
    if any(not token.lstrip("-").isdigit() for token in tokens[::2]) or any(t not in "+-*" for t in tokens[1::2]):
        raise UserError(
            f"no worked steps for {expression!r}: expected numbers with + and - (or * alone) between them; "
            "for basic_arithmetic set operators=['+', '-'] and allow_parentheses=false"
        )
    return int(tokens[0]), list(zip(tokens[1::2], (int(token) for token in tokens[2::2]), strict=True))
