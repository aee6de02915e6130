"""Candidate responses of a procedural teacher that is right, except for flaws at given rates and for carelessness.

The flaw of a candidate is recorded in ``provenance`` only, a column that no filter reads; tests compare it with what
the filters drop. A flaw carries the name of the reason for which the filters should drop it.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from qwen3_lit.curation.synthesis import Record, SynthesisRequest
from qwen3_lit.curation.synthesis_problems import entry_of, problem_records, query_text
from qwen3_lit.curation.synthesis_split import stream, text_key
from qwen3_lit.curation.worked_steps import CARELESS_STEPS, WorkedSolution, solve
from qwen3_lit.data.schema import read_records
from qwen3_lit.errors import UserError

DEFAULT_RATES: dict[str, float] = {
    "wrong_answer": 0.10,
    "repetition": 0.05,
    "guessing": 0.05,
    "disagreement": 0.05,
    "language_mixing": 0.05,
    "held_out_similarity": 0.03,
}
"""Share of the candidates that carry each flaw, unless an option of the same name says otherwise."""

_GUESSES = ("I guess it is {answer}.", "It is probably {answer}.", "Not sure, maybe {answer}.", "{answer}")
_FOREIGN = ("所以", "进位", "然后再加", "ответ такой", "затем", "次に計算する")
_REWORDINGS = ("Please answer: {query}", "{query} Thank you!", "Here is a question. {query}", "  {query}")


def corrupted(answer: str, rng: random.Random) -> str:
    """A wrong answer of the same form: a list one item short, one digit changed, or two letters exchanged."""
    if answer.startswith("[") and ", " in answer:  # scorers of lists tolerate a changed digit
        return answer.rpartition(", ")[0] + "]"
    digits = [i for i, character in enumerate(answer) if character.isdigit()]
    if digits:
        position = rng.choice(digits)
        other = rng.choice([digit for digit in "0123456789" if digit != answer[position]])
        return answer[:position] + other + answer[position + 1 :]
    swaps = [i for i in range(len(answer) - 1) if answer[i] != answer[i + 1]]
    if not swaps:
        return answer + "x"
    i = rng.choice(swaps)
    return answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :]


def _wrong_answer(lines: list[str], answer: str, rng: random.Random) -> tuple[str, str]:
    wrong = corrupted(answer, rng)
    return "\n".join([*lines[:-1], wrong]), wrong


def _repetition(lines: list[str], answer: str, rng: random.Random) -> tuple[str, str]:
    position = rng.randrange(len(lines))
    return "\n".join([*lines[:position], *[lines[position]] * rng.randint(6, 12), *lines[position:]]), answer


def _guessing(lines: list[str], answer: str, rng: random.Random) -> tuple[str, str]:
    return rng.choice(_GUESSES).format(answer=answer), answer


def _disagreement(lines: list[str], answer: str, rng: random.Random) -> tuple[str, str]:
    return "\n".join([*lines[:-1], corrupted(answer, rng)]), answer


def _language_mixing(lines: list[str], answer: str, rng: random.Random) -> tuple[str, str]:
    position = rng.randrange(len(lines))
    return "\n".join([*lines[:position], rng.choice(_FOREIGN), *lines[position:]]), answer


_FLAWS: dict[str, Callable[[list[str], str, random.Random], tuple[str, str]]] = {
    "wrong_answer": _wrong_answer,
    "repetition": _repetition,
    "guessing": _guessing,
    "disagreement": _disagreement,
    "language_mixing": _language_mixing,
}


def respond(problem: Record, flaw: str | None, rng: random.Random, careless: bool = False) -> tuple[str, str]:
    """Thinking and answer of the teacher, with one flaw or none; a careless one may be wrong besides."""
    task, entry = problem["task"], entry_of(problem)
    if careless and task in CARELESS_STEPS:
        solution = WorkedSolution(tuple(CARELESS_STEPS[task](entry)))
    else:
        solution = solve(task, entry)
    if flaw is None:
        return solution.thinking, solution.answer
    return _FLAWS[flaw](list(solution.lines), solution.answer, rng)


def candidate_records(request: SynthesisRequest) -> Iterator[Record]:
    """Stream ``n`` candidates to each of ``count`` problems (all of ``--problems`` when it holds fewer).

    Options, besides those of ``problems``: ``n`` (default 4), a rate for each flaw of ``DEFAULT_RATES``, and
    ``careless_share`` (default 0): share of the candidates worked out by ``CARELESS_STEPS``. The filters drop those
    that came out wrong and have no reason to drop the others, so a model that imitates what is left is careless at
    times, which reinforcement on fresh problems then corrects.

    Raises:
        UserError: rates outside [0, 1] or adding up to more than 1, or a task without worked steps.
    """
    n = request.option("n", 4)
    careless_share = request.option("careless_share", 0.0)
    rates = {flaw: request.option(flaw, rate) for flaw, rate in DEFAULT_RATES.items()}
    if not 0 <= careless_share <= 1:
        raise UserError(f"option careless_share={careless_share}: expected a share between 0 and 1")
    if n < 1:
        raise UserError(f"option n={n}: at least one candidate a problem is needed")
    if min(rates.values()) < 0 or sum(rates.values()) > 1:
        raise UserError(f"rates of flaws {rates}: each must be 0 or more and their sum at most 1")
    own = {"n", "careless_share", *DEFAULT_RATES}
    options = {name: value for name, value in request.options.items() if name not in own}
    inner = replace(request, options=options)
    problems: Iterator[Record]
    if request.problems:
        problems = itertools.islice(read_records(request.problems, "problem"), request.count)
    else:
        problems = problem_records(inner)
    if request.held_out:
        held_out = list(read_records(request.held_out, "problem"))
    elif rates["held_out_similarity"]:
        other_side = replace(inner, split="held_out", count=max(1, min(64, request.count)), exclude=())
        held_out = list(problem_records(other_side))
    else:
        held_out = []
    rng = stream("candidates", request.split, request.seed)
    return _candidates(problems, held_out, rates, n, careless_share, rng)


def _candidates(
    problems: Iterator[Record],
    held_out: list[Record],
    rates: dict[str, float],
    n: int,
    careless_share: float,
    rng: random.Random,
) -> Iterator[Record]:
    choices = [None, *rates]
    weights = [1 - sum(rates.values()), *rates.values()]
    for problem in problems:
        for index in range(n):
            flaw = rng.choices(choices, weights)[0]
            source = problem
            if flaw == "held_out_similarity":
                source = _reworded(rng.choice(held_out), rng)
            inner_flaw = None if flaw == "held_out_similarity" else flaw
            careless = careless_share > 0 and rng.random() < careless_share
            thinking, answer = respond(source, inner_flaw, rng, careless)
            yield {
                "messages": [
                    *source["messages"],
                    {"role": "assistant", "content": answer, "reasoning_content": thinking},
                ],
                "mode": "think",
                "task": source["task"],
                "answer": source["answer"],
                "metadata": source["metadata"],
                "problem_id": f"{text_key(query_text(source)):016x}",
                "provenance": {"flaw": flaw, "careless": careless, "candidate": index},
            }


def _reworded(problem: Record, rng: random.Random) -> Record:
    query = rng.choice(_REWORDINGS).format(query=query_text(problem))
    return problem | {"messages": [{"role": "user", "content": re.sub(r"\s+$", "", query)}]}
