"""Where the final answer of a text stands: boxed, tagged, announced, or last. Pure string work in linear time."""

import re
from fractions import Fraction

_NUMBER = re.compile(r"(?<![\w.])-?\d{1,64}(?:,\d{3})*(?:\.\d{1,64})?(?:/\d{1,64})?(?![\w/])")
_PLAIN_NUMBER = re.compile(r"[-+]?\d{1,64}(?:\.\d{1,64})?(?:/\d{1,64})?")
_ANSWER_TAG = re.compile(r"<answer>([^<]*)</answer>")
_ANNOUNCED = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)\s*:?[ \t]*([^\n]+)", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    """Content of the last complete ``\\boxed{...}``, braces matched; None when there is none."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for index in range(start + len("\\boxed"), len(text)):
            if text[index] == "{":
                depth += 1
            elif text[index] == "}":
                depth -= 1
                if depth == 0:
                    return text[start + len("\\boxed{") : index].strip()
        start = text.rfind("\\boxed{", 0, start)
    return None


def last_number(text: str) -> str | None:
    """The last number of the text (integer, decimal or a/b), None when there is none."""
    found = None
    for match in _NUMBER.finditer(text):
        found = match.group()
    return found


def as_number(text: str) -> Fraction | None:
    """The exact value of a plain number such as ``1,234``, ``-0.5`` or ``3/4``; None for anything else."""
    plain = text.strip().strip("$").strip().replace(",", "").rstrip(".")
    if not _PLAIN_NUMBER.fullmatch(plain):
        return None
    numerator, _, denominator = plain.partition("/")
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


def same_number(text: str, reference: str) -> bool | None:
    """Whether the final answer of `text` equals a numeric `reference`; None when the reference is not a number."""
    wanted = as_number(reference)
    if wanted is None:
        return None
    candidate = as_number(final_answer(text))
    if candidate is None and last_boxed(text) is None:
        number = last_number(final_answer(text))
        candidate = None if number is None else as_number(number)
    return candidate == wanted
