"""Where the final answer of a text stands: boxed, tagged, announced, or last. Pure string work in linear time."""

import re
from fractions import Fraction

# A comma belongs to a number where it groups thousands: 3,5 is a pair, not 35.
DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,21}|\d{1,64})(?:\.\d{1,64})?(?:/\d{1,64})?"
_NUMBER = re.compile(rf"(?<![\w.])(?<!\d,)-?{DIGITS}(?![\w/])(?!,\d)")
_PLAIN_NUMBER = re.compile(rf"[-+]?{DIGITS}")
_EMPHASIS = re.compile(r"(?<!\w)\*\*|\*\*(?!\w)")
_REMARK = re.compile(r"(?<=\S)\s+\([^()]*\)(?=[\s.!]*$)")
# What makes a number beside it a part of an expression: LaTeX's braces and commands, and operators.
_EXPRESSION_BEFORE = re.compile(r"(?:[-+*/^_{×÷·]|\\[a-zA-Z]+)\s*$")
_EXPRESSION_AFTER = re.compile(r"\s*(?:[-+*/^_}×÷·!]\s*\S|\\[a-zA-Z])")
_BRACE = re.compile(r"\\boxed\{|[{}]")
_ANSWER_TAG = re.compile(r"<answer>([^<]*)</answer>")
_ANNOUNCED = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)\s*:?[ \t]*([^\n]+)", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    """Content of the last complete ``\\boxed{...}``, braces matched; None when there is none."""
    opened: list[tuple[int, bool]] = []
    last: tuple[int, int] | None = None
    for match in _BRACE.finditer(text):
        if match.group() != "}":
            opened.append((match.end(), match.group() != "{"))
        elif opened:
            start, is_box = opened.pop()
            if is_box and (last is None or start > last[0]):
                last = start, match.start()
    return None if last is None else text[last[0] : last[1]].strip()


def last_number(text: str) -> str | None:
    """The last number of the text (integer, decimal or a/b), None when there is none."""
    found = None
    for match in _NUMBER.finditer(text):
        found = match.group()
    return found


def as_number(text: str) -> Fraction | None:
    """The exact value of a plain number such as ``1,234``, ``-0.5`` or ``3/4``; None for anything else."""
    plain = text.strip().strip("$").strip().rstrip(".")
    if not _PLAIN_NUMBER.fullmatch(plain):
        return None
    numerator, _, denominator = plain.replace(",", "").partition("/")
    if denominator and not int(denominator):
        return None
    return Fraction(numerator) / (int(denominator) if denominator else 1)


def final_answer(text: str) -> str:
    """The answer a text commits to: last boxed, else last <answer> tag, else announced last, else the whole text."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    tags = _ANSWER_TAG.findall(text)
    if tags:
        return str(tags[-1]).strip()
    announced = _ANNOUNCED.findall(text)
    if announced:
        return str(announced[-1]).strip().rstrip(".").strip()
    return text.strip()


def stated_number(answer: str) -> str | None:
    """The number that an answer in words states: its last one, without a closing remark in brackets.

    ``7 apples``, ``3 + 4 = 7`` and ``7 (3 of one, 4 of the other)`` are 7. None when there is no number, or when the
    last one is part of an expression: ``\\frac{1}{2}`` is not 2.
    """
    answer = _REMARK.sub("", _EMPHASIS.sub("", answer))
    matches = list(_NUMBER.finditer(answer))
    if not matches:
        return None
    match = matches[-1]
    before, after = answer[: match.start()], answer[match.end() :]
    if _EXPRESSION_BEFORE.search(before[-32:]) or _EXPRESSION_AFTER.match(after):
        return None
    return match.group()


def same_number(text: str, reference: str) -> bool | None:
    """Whether the final answer of `text` equals a numeric `reference`.

    None when the reference is not a number, or nothing is boxed and the answer is an expression, whose value is for a
    computer algebra system to tell. Against a whole number a fraction is wrong: 391/17 is a division left undone.
    """
    wanted = as_number(reference)
    if wanted is None:
        return None
    answer = final_answer(text)
    if as_number(answer) is None and last_boxed(text) is None:
        stated = stated_number(answer)
        if stated is None:
            return None if any(character.isdigit() for character in answer) else False
        answer = stated
    if "/" in answer and "/" not in reference and wanted.denominator == 1:
        return False
    return as_number(answer) == wanted
