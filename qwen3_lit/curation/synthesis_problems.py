"""Problem records of reasoning-gym tasks.

A record holds the query as ``messages``, the gold ``answer``, the ``task`` and, as ``metadata``, what reasoning-gym
wrote there, ``source_dataset`` included, so that the task's own scorer can be applied to the record.
Query texts are unique in a file and belong to one split for good (see ``synthesis_split``).
"""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from qwen3_lit.curation.synthesis import Record, SynthesisRequest, unknown_name
from qwen3_lit.curation.synthesis_split import split_of, stream, stream_seed, text_key
from qwen3_lit.data.schema import iter_rows
from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.reasoning_gym_answer import ReasoningGymAnswerReward
from qwen3_lit.rl.rewards.reward import RewardInput

DEFAULT_TASKS = ("chain_sum", "products", "number_sorting", "count_bits", "letter_counting", "spell_backward")
PROBLEM_OPTIONS = ("style", "unique")
_PATIENCE = 2_000
"""Draws in a row that may be repeated or foreign before a task counts as exhausted."""
_STREAM_LENGTH = 2**40
_PART_LENGTH = 500
_IN_PARTS = frozenset({"acre", "gsm_symbolic", "list_functions", "pool_matrix", "word_ladder"})
"""Tasks whose data sets make lists of their whole length at first, or refuse a long one or a long seed."""

SHORT_QUESTIONS: dict[str, str] = {
    "basic_arithmetic": "What is {expression}?",
    "chain_sum": "What is {expression}?",
    "products": "What is {expression}?",
    "gcd": "What is the greatest common divisor of {numbers}?",
    "number_sorting": "Sort in {direction} order: {numbers}. Answer with a list like ['1', '2'].",
    "count_bits": "How many 1 bits has {number}?",
    "spell_backward": "Spell {word} backward.",
}
"""``style=short``: a brief wording of our own, for models that cannot afford the task's own instructions."""


def query_text(record: Record) -> str:
    """The text that makes a query the same or another: its user turns (or ``prompt``)."""
    messages = record.get("messages") or [{"role": "user", "content": record.get("prompt", "")}]
    return "\n".join(str(message.get("content") or "") for message in messages if message["role"] == "user")


def entry_of(record: Record) -> dict[str, Any]:
    """The reasoning-gym entry that a problem or candidate record came from."""
    return {"question": query_text(record), "answer": record["answer"], "metadata": record["metadata"]}


def excluded_keys(paths: tuple[str, ...]) -> set[int]:
    """Hashes of the queries in problem or conversation files.

    Raises:
        UserError: an unreadable file, or a row that has no query.
    """
    keys: set[int] = set()
    for path in paths:
        for where, row in iter_rows(path):
            if isinstance(row, UserError):
                raise row
            if not isinstance(row, dict) or not (isinstance(row.get("messages"), list) or row.get("prompt")):
                raise UserError(f"{where}: field 'messages': missing, expected a problem or a conversation to exclude")
            keys.add(text_key(query_text(row)))
    return keys


def entry_stream(request: SynthesisRequest, task: str) -> Callable[[], dict[str, Any]]:
    """A function that draws the next reasoning-gym entry of a task.

    Raises:
        UserError: unknown task, unknown option or values that the task refuses.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(unknown_name("reasoning-gym task", task, sorted(DATASETS)))
    fields = [field.name for field in dataclasses.fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
    own = ("digits",) if task == "products" else ()
    options = request.task_options(task, (*fields, *own, *PROBLEM_OPTIONS))
    for name in PROBLEM_OPTIONS:
        options.pop(name, None)
    if "digits" in options:
        digits = _factor_digits(options["digits"])
        rng = stream("problems", task, request.split, request.seed)
        return lambda: product_entry(rng, digits)

    in_parts = task in _IN_PARTS
    length = _PART_LENGTH if in_parts else _STREAM_LENGTH

    def part(number: int) -> Any:
        seed = stream_seed("problems", task, request.split, request.seed, *((number,) if in_parts else ()))
        return reasoning_gym.create_dataset(task, seed=seed % 2**31 if in_parts else seed, size=length, **options)

    try:
        dataset = part(0)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"task {task} refuses its options {options}: {error}") from error
    index = 0

    def draw() -> dict[str, Any]:
        nonlocal dataset, index
        if index and index % length == 0:
            dataset = part(index // length)
        entry = dataset[index % length]
        index += 1
        return entry

    return draw


def product_entry(rng: random.Random, digits: tuple[int, ...]) -> dict[str, Any]:
    """A ``products`` entry whose factors have given lengths (reasoning-gym's own have one length for all)."""
    factors = [rng.randint(0 if width == 1 else 10 ** (width - 1), 10**width - 1) for width in digits]
    rng.shuffle(factors)
    result = 1
    for factor in factors:
        result *= factor
    expression = " * ".join(str(factor) for factor in factors)
    return {
        "question": f"Solve the following multiplication: {expression}. Give only the result as your final answer.",
        "answer": str(result),
        "metadata": {"source_dataset": "products", "expression": expression, "num_terms": len(factors)},
    }


def question_of(task: str, entry: dict[str, Any], style: str) -> str:
    """The wording of an entry's question."""
    if style == "short" and task in SHORT_QUESTIONS:
        metadata = entry["metadata"]
        numbers = metadata.get("original_numbers", metadata.get("numbers", []))
        listed = ", ".join(str(number) for number in numbers) if isinstance(numbers, list) else ""
        values = metadata | {"numbers": listed}
        return SHORT_QUESTIONS[task].format(**values)
    return str(entry["question"]).strip()


def problem_records(request: SynthesisRequest) -> Iterator[Record]:
    """Stream problem records; tasks are drawn at random, in the proportion in which they are named.

    Options: ``style`` (``original``, the default, or ``short``), ``unique`` (default true: no query text twice),
    ``products.digits`` (for example ``2x1``) and every field of the reasoning-gym configurations of the tasks.

    Raises:
        UserError: unknown task or option, a task has too few distinct problems for the count, or its scorer does not
            tell right from wrong.
    """
    tasks = request.tasks or DEFAULT_TASKS
    draw = {task: entry_stream(request, task) for task in tasks}
    request.check_options("problems", tasks, _bare_options(tasks))
    style, unique = request.option("style", "original"), request.option("unique", True)
    if style not in ("original", "short"):
        raise UserError(f"option style={style!r}: expected original or short")
    excluded = excluded_keys(request.exclude)
    return _problem_stream(request, tasks, draw, style, unique, excluded)


def _problem_stream(
    request: SynthesisRequest,
    tasks: tuple[str, ...],
    draw: dict[str, Callable[[], dict[str, Any]]],
    style: str,
    unique: bool,
    taken: set[int],
) -> Iterator[Record]:
    choose = stream("task order", *tasks, request.split, request.seed)
    checked: set[str] = set()
    for made in range(request.count):
        task = choose.choice(tasks)
        for _ in range(_PATIENCE):
            entry = draw[task]()
            question = question_of(task, entry, style)
            key = text_key(question)
            if split_of(question) == request.split and key not in taken:
                break
        else:
            raise UserError(
                f"task {task} has no further distinct {request.split} problems after {made} of {request.count}; "
                "ask for fewer, widen the task with --option, or allow repeats with --option unique=false"
            )
        if unique:
            taken.add(key)
        record = {
            "messages": [{"role": "user", "content": question}],
            "answer": "" if entry["answer"] is None else str(entry["answer"]),
            "task": task,
            "metadata": dict(entry["metadata"]),
            "split": request.split,
        }
        if task not in checked:
            gold = entry["answer"] if entry["answer"] is not None else entry["metadata"].get("example_answer")
            check_scorer(record, gold)
            checked.add(task)
        yield record


def check_scorer(record: Record, gold: object) -> None:
    """Score a record as it is read back from JSON: with its gold answer (None: not known) and with no answer at all.

    Raises:
        UserError: the gold answer counts as wrong, or the other one as right.
    """
    problem = json.loads(json.dumps(record))
    reward = ReasoningGymAnswerReward()

    def is_right(answer: str) -> bool:
        return reward(RewardInput(problem["messages"], answer, None, answer, problem)) == 1.0

    if gold is not None and not is_right(str(gold)):
        raise UserError(
            f"task {record['task']}: its scorer counts its own answer {str(gold)[:40]!r} as wrong; leave out the task"
        )
    if is_right("?"):
        raise UserError(f"task {record['task']}: its scorer counts the answer '?' as right; leave out the task")


def _bare_options(tasks: tuple[str, ...]) -> tuple[str, ...]:
    from reasoning_gym.factory import DATASETS

    names = {field.name for task in tasks for field in dataclasses.fields(DATASETS[task][1])} - {"seed", "size"}
    return (*sorted(names), *(("digits",) if "products" in tasks else ()), *PROBLEM_OPTIONS)


def _factor_digits(value: object) -> tuple[int, ...]:
    parts = str(value).split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"option products.digits={value!r}: expected lengths of the factors, like 2x1")
    return tuple(int(part) for part in parts)
