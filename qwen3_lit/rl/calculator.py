"""Arithmetic on text from a model, evaluated by walking its syntax tree: no names, no calls, bounded sizes."""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

MAX_CHARS = 200
MAX_BITS = 512
MAX_EXPONENT = 1000

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda left, right: Fraction(left // right),
    ast.Mod: operator.mod,
}


class CalculatorError(ValueError):
    """The expression cannot be evaluated; the message is meant for the model that wrote it."""


def evaluate(expression: str) -> str:
    """Exact value of an arithmetic expression over `+ - * / // % **` and parentheses, as text.

    Whole results print as integers, others as decimals with at most 10 digits behind the point.

    Raises:
        CalculatorError: If the text is not such an expression, divides by zero or grows too large.
    """
    if len(expression) > MAX_CHARS:
        raise CalculatorError(f"expression is longer than {MAX_CHARS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        value = _value(tree.body)
    except ZeroDivisionError as error:
        raise CalculatorError("division by zero") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, CalculatorError):
            raise
        raise CalculatorError("not an arithmetic expression") from error
    if value.denominator == 1:
        return str(value.numerator)
    # In integers: a float would overflow for large fractions.
    whole, decimals = divmod(round(abs(value) * 10**10), 10**10)
    text = f"{whole}.{decimals:010d}".rstrip("0").rstrip(".")
    return f"-{text}" if value < 0 and text != "0" else text


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        result = Fraction(str(node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = _value(node.operand)
        result = -operand if isinstance(node.op, ast.USub) else operand
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        result = _power(_value(node.left), _value(node.right))
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        result = _BINARY[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise CalculatorError("only numbers, + - * / // % ** and parentheses are allowed")
    if max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
        raise CalculatorError("a number grows too large")
    return result


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise CalculatorError("exponents must be whole numbers")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) > MAX_EXPONENT or (size - 1) * abs(int(exponent)) > MAX_BITS:
        raise CalculatorError("a number grows too large")
    return Fraction(base ** int(exponent))
