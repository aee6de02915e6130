"""Worked solutions of reasoning-gym tasks: the registry and the record type.

A worked solution is a short chain of lines in which every line can be computed from the lines next to it and from
single-digit facts, so that a small model can learn it by copying and by looking up tables. The same lines serve as
pre-training text, as cold-start thinking and as the sound part of candidate responses, so the wording must be one.

A solver takes a reasoning-gym entry (``question``, ``answer``, ``metadata``) and returns its lines; the last line is
always the answer. A solver whose last line differs from the entry's answer is a bug, and ``solve`` raises on it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_lit.curation.worked_steps_arithmetic import (
    careless_sum_lines,
    chain_sum_lines,
    greatest_common_divisor_lines,
    product_lines,
)
from qwen3_lit.curation.worked_steps_sequences import (
    count_bits_lines,
    letter_counting_lines,
    number_sorting_lines,
    spell_backward_lines,
)
from qwen3_lit.errors import UserError

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class WorkedSolution:
    """The lines of a solution; the last one is the answer."""

    lines: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.lines[-1]

    @property
    def thinking(self) -> str:
        return "\n".join(self.lines)


WORKED_STEPS: dict[str, Callable[[Entry], list[str]]] = {
    "basic_arithmetic": chain_sum_lines,
    "chain_sum": chain_sum_lines,
    "products": product_lines,
    "gcd": greatest_common_divisor_lines,
    "number_sorting": number_sorting_lines,
    "count_bits": count_bits_lines,
    "letter_counting": letter_counting_lines,
    "spell_backward": spell_backward_lines,
}
"""Task name (a reasoning-gym dataset) -> solver. Add a task by adding its solver here."""

UNASKED_TASKS = tuple(task for task in WORKED_STEPS if task != "basic_arithmetic")
"""The tasks when none is named: all whose own default options the solvers can take."""
CARELESS_STEPS: dict[str, Callable[[Entry], list[str]]] = {
    "basic_arithmetic": careless_sum_lines,
    "chain_sum": careless_sum_lines,
}
"""Task name -> solver that skips what is often, but not always, without effect: its last line may be wrong."""


def solve(task: str, entry: Entry) -> WorkedSolution:
    """Write the solution of one reasoning-gym entry.

    Raises:
        UserError: the task has no written-out solution.
        ValueError: the solver and the entry disagree about the answer.
    """
    solver = WORKED_STEPS.get(task)
    if solver is None:
        raise UserError(f"task {task!r} has no worked steps; tasks that have them: {', '.join(sorted(WORKED_STEPS))}")
    solution = WorkedSolution(tuple(solver(entry)))
    if solution.answer != str(entry["answer"]):
        raise ValueError(
            f"worked steps of {task} end in {solution.answer!r}, the entry's answer is {entry['answer']!r}: "
            f"{entry['question']!r}"
        )
    return solution
