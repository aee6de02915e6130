"""Is an answer worked out, or the question once more? A computer algebra system gives ``17 \\cdot 23`` its value too.

Where the reference is a number (or a list of numbers), the answer has to be written as one: with a unit, a currency, a
name in front (``x =``), as a fraction, in scientific notation or as one power. Whatever the reference, the answer may
hold no sum, integral, binomial, factorial and the like that the reference does not hold.
"""

import re

from qwen3_lit.rl.rewards.final_answer import DIGITS

_DECIMAL = r"[-+]?\d{1,64}(?:\.\d{1,64})?"
_NUMBER = rf"[-+]?(?:{DIGITS}|\.\d{{1,64}})"
_GROUP = rf"(?:\{{\s*{_DECIMAL}\s*\}}|\d)"
_FRACTION = rf"[-+]?(?:\d{{1,64}}\s*)?\\frac\s*{_GROUP}\s*{_GROUP}"
_BASE = rf"(?:{_DECIMAL}\s*(?:\\cdot|\\times|\*|×)\s*10|{_DECIMAL}|\(\s*{_DECIMAL}\s*\))"
_POWER = rf"{_BASE}\s*\^\s*(?:\{{\s*-?\d+\s*\}}|-?\d+)"
_NAME = r"(?:[A-Za-z]\w*\s*=\s*)?"
_DEGREES = r"\s*(?:%|°|\^\s*\{?\\circ\}?)?"
_UNIT = r"(?:\s*[A-Za-z](?:[A-Za-z\s./²³]|\^\{?-?\d\}?)*)?"
_REFERENCE = re.compile(rf"{_NAME}(?:{_FRACTION}|{_NUMBER}){_DEGREES}")
_ANSWER = re.compile(rf"{_NAME}(?:{_POWER}|{_FRACTION}|{_NUMBER}){_DEGREES}{_UNIT}")
_DIVISION = re.compile(r"\\frac|\d/")
_OPERATION = re.compile(
    r"\\(?:sum|prod|i{0,3}int|oint|lim|[dt]?binom|choose|gcd|lcm|max|min|lfloor|lceil|[bp]?mod|operatorname)(?![a-z])|!"
)
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_INVISIBLE = re.compile(r"\\(?:left|right|[!,;: ()\[\]])|\\?\$|~")


def is_evaluated(answer: str, reference: str, question: str = "") -> bool:
    """Whether `answer` is a value as far as `reference` is one.

    Against a whole number a fraction is a division left undone, and a power is no answer when the question names all
    of its numbers.
    """
    answer, reference = _plain(answer), _plain(reference)
    if not set(_OPERATION.findall(answer)) <= set(_OPERATION.findall(reference)):
        return False
    if not _all_match(_REFERENCE, reference):
        return True
    # Of a chain such as 17 * 23 = 391 the last member counts; the pairs of x = 1, y = 2 are no chain.
    if not re.search(r",\s*[A-Za-z]\w*\s*=", answer):
        answer = re.split(r"=|\\approx", answer)[-1]
    if not _all_match(_ANSWER, answer):
        return False
    if _DIVISION.search(answer) and not re.search(r"[./%]|\\frac", reference):
        return False
    asked = set(re.findall(r"\d+", question))
    return not any(asked.issuperset(re.findall(r"\d+", power)) for power in re.findall(_POWER, answer))


def is_numeric(reference: str) -> bool:
    """Whether `reference` is a number or a list of numbers."""
    return _all_match(_REFERENCE, _plain(reference))


def _all_match(pattern: re.Pattern[str], text: str) -> bool:
    # Split first: a pattern for the whole list could read each comma in two ways, in exponential time.
    inside = re.sub(r"^[(\[](.*)[)\]]$", r"\1", text.strip())
    return all(pattern.fullmatch(part.strip()) for part in re.split(r",(?!\d{3}(?!\d))", inside))


def _plain(text: str) -> str:
    """The text without what only typesets it; words in ``\\text{}`` are units and go too."""
    text = text.replace("−", "-").replace("{,}", ",").replace("\\{", "(").replace("\\}", ")").replace("\\%", "%")
    text = _WRAPPED.sub(lambda match: match[1] if re.search(r"\d", match[1]) else " ", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", _INVISIBLE.sub(" ", text))
    return " ".join(text.split()).rstrip(".").strip()
