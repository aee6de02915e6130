"""Preference records for the reward model: the better and the worse answer to one query.

Half of them (by default) carry a reference answer, as a judge with reference would see it; the others are open
questions without one. The worse answer breaks the instruction, is wrong, or is one that nobody would like.
"""

from collections.abc import Iterator
from dataclasses import replace

from qwen3_lit.curation.general_tasks import general_items, general_options, load_general_tasks
from qwen3_lit.curation.synthesis import Record, SynthesisRequest
from qwen3_lit.curation.synthesis_split import stream
from qwen3_lit.errors import UserError

_WITHOUT_REFERENCE = ("preference",)


def preference_records(request: SynthesisRequest) -> Iterator[Record]:
    """Stream preference records.

    Options: those of ``GeneralOptions``, ``unique`` (false) and ``with_reference`` (0.5), the share of the records that
    carry a reference. Tasks: any general task but ``mode_flags`` and ``calculator_tool``, whose right answers depend on
    more than their text.

    Raises:
        UserError: a share outside [0, 1], or tasks that cannot give the records asked for.
    """
    own = ("unique", "with_reference")
    share = request.option("with_reference", 0.5)
    if not 0 <= share <= 1:
        raise UserError(f"option with_reference={share}: expected a share between 0 and 1")
    usable = [task for task in load_general_tasks() if task not in ("mode_flags", "calculator_tool")]
    tasks = request.tasks or tuple(usable)
    for task in tasks:
        if task not in usable:
            raise UserError(f"task {task!r} gives no preference pairs; tasks that do: {', '.join(usable)}")
    return _pairs(request, tasks, share, own)


def _pairs(request: SynthesisRequest, tasks: tuple[str, ...], share: float, own: tuple[str, ...]) -> Iterator[Record]:
    options, unique = general_options(request, own), request.option("unique", False)
    open_tasks = tuple(task for task in tasks if task in _WITHOUT_REFERENCE)
    closed_tasks = tuple(task for task in tasks if task not in _WITHOUT_REFERENCE)
    if (share > 0 and not closed_tasks) or (share < 1 and not open_tasks):
        raise UserError(
            f"option with_reference={share} cannot be met by the tasks {', '.join(tasks)}: "
            f"{', '.join(_WITHOUT_REFERENCE)} has no reference, all others have one"
        )
    sources = {
        True: general_items(replace(request, tasks=closed_tasks), options, unique) if closed_tasks else None,
        False: general_items(replace(request, tasks=open_tasks), options, unique) if open_tasks else None,
    }
    rng = stream("preferences", *tasks, request.split, request.seed)
    for _ in range(request.count):
        with_reference = rng.random() < share
        source = sources[with_reference]
        assert source is not None
        task, item = next(source)
        record: Record = {
            "messages": item.messages,
            "chosen": item.gold,
            "rejected": str(item.wrong),
            "task": task,
            "split": request.split,
        }
        if with_reference:
            record["reference"] = item.reference or item.gold
        yield record
