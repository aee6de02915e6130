"""Pre-training text with worked steps: questions, written-out solutions and answers, as in a textbook.

The solution lines are those of ``worked_steps``, unchanged; only the words around them vary. Part of the documents are
drills, single columns of arithmetic without a problem around them: a small model needs far more repetitions of the
one-digit tables than of the layout, and a drill line costs a fraction of a problem's tokens.
"""

import random
from collections.abc import Iterator

from qwen3_lit.curation.synthesis import Record, SynthesisRequest, unknown_name
from qwen3_lit.curation.synthesis_problems import entry_of, problem_records
from qwen3_lit.curation.synthesis_split import stream
from qwen3_lit.curation.worked_steps import UNASKED_TASKS, WORKED_STEPS, solve
from qwen3_lit.curation.worked_steps_arithmetic import DRILLED_OPERATORS, drill_line
from qwen3_lit.errors import UserError

FRAMES: tuple[tuple[str, str, str], ...] = (
    ("Question: ", "\n", "\nAnswer: "),
    ("Q: ", "\n", "\nA: "),
    ("Problem: ", "\nSolution:\n", "\nAnswer: "),
    ("Exercise. ", "\nSteps:\n", "\nThe answer is "),
    ("", "\n", "\nSo the answer is "),
)
"""Words before the question, between question and steps, and before the answer."""

_DRILL_LINES = 6
"""Drill lines in place of one problem: about as many tokens."""


def document_records(request: SynthesisRequest) -> Iterator[Record]:
    """Stream ``{"text"}`` records.

    Options, besides those of ``problems``: ``problems_per_document`` (default 4), ``drill_share`` (default 0.25, the
    share of documents that are drills; only where a task works in columns), ``frames`` (how many of the ways to frame a
    problem are used, default all; a small model learns to copy sooner where distances are alike) and ``unique``
    (default false here: a small task may be practised many times).

    Raises:
        UserError: a share outside [0, 1], no problem in a document, or a task without worked steps.
    """
    own = ("problems_per_document", "drill_share", "frames")
    per_document, drill_share = request.option("problems_per_document", 4), request.option("drill_share", 0.25)
    if per_document < 1 or not 0 <= drill_share <= 1:
        raise UserError(
            f"options problems_per_document={per_document}, drill_share={drill_share}: expected 1 or more, and a share"
        )
    frames = request.option("frames", len(FRAMES))
    if not 1 <= frames <= len(FRAMES):
        raise UserError(f"option frames={frames}: expected 1 to {len(FRAMES)}")
    for task in request.tasks:
        if task not in WORKED_STEPS:
            raise UserError(unknown_name("task with worked steps", task, list(WORKED_STEPS)))
    options = {"unique": False} | {name: value for name, value in request.options.items() if name not in own}
    inner = SynthesisRequest(
        count=request.count * per_document,
        seed=request.seed,
        split=request.split,
        tasks=request.tasks or UNASKED_TASKS,
        options=options,
        exclude=request.exclude,
    )
    rng = stream("documents", request.split, request.seed)
    problems = problem_records(inner)
    asked = {task: options.get(f"{task}.operators", known) for task, known in DRILLED_OPERATORS.items()}
    columns = [
        [operator for operator in DRILLED_OPERATORS[task] if operator in asked[task]]
        for task in inner.tasks
        if task in DRILLED_OPERATORS
    ]
    drilled = [operators for operators in columns if operators]
    drill_share = drill_share if drilled else 0.0
    return _documents(request.count, per_document, problems, rng, drilled, drill_share, FRAMES[:frames])


def _documents(
    count: int,
    per_document: int,
    problems: Iterator[Record],
    rng: random.Random,
    drilled: list[list[str]],
    drill_share: float,
    frames: tuple[tuple[str, str, str], ...],
) -> Iterator[Record]:
    for _ in range(count):
        if rng.random() < drill_share:
            lines = [drill_line(rng.choice(rng.choice(drilled)), rng) for _ in range(_DRILL_LINES * per_document)]
            yield {"text": "\n".join(lines) + "\n", "source": "worked_steps"}
            continue
        parts = []
        for _ in range(per_document):
            problem = next(problems)
            before, between, after = rng.choice(frames)
            solution = solve(problem["task"], entry_of(problem))
            question = problem["messages"][0]["content"]
            parts.append(f"{before}{question}{between}{solution.thinking}{after}{solution.answer}\n")
        yield {"text": "\n".join(parts), "source": "worked_steps"}
