"""Plain words for what a phase did: one line a figure, from the numbers alone."""

from collections.abc import Iterator, Mapping
from typing import Any

FRACTIONS = ("accuracy", "think_follow", "truncated", "kept_fraction", "pair_accuracy", "rl_accuracy")
"""Figures shown in per cent; their changes are percentage points."""
MODES = {"_no_think": ", not thinking", "_think": ", thinking"}
DETAILS = ("completion_tokens", "truncated")
"""Figures that explain others: they are in the tables, not in the verdicts."""
TITLES = {
    "held_out_loss": "held-out loss",
    "accuracy": "accuracy",
    "reward": "reward",
    "think_follow": "mode flag obeyed",
    "pair_accuracy": "pairs ranked right",
    "completion_tokens": "tokens a completion",
    "kept_fraction": "candidates kept",
    "truncated": "completions cut",
}


def is_fraction(name: str) -> bool:
    """Whether a figure is a share of one."""
    return name.partition("/")[0].startswith(FRACTIONS)


def shown(name: str, value: Any) -> str:
    """A figure as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if is_fraction(name):
        return f"{100 * value:.1f} %"
    if name.startswith("completion_tokens"):
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def title(name: str) -> str:
    """A figure's name in words."""
    base, slash, task = name.partition("/")
    ending = next((ending for ending in MODES if base.endswith(ending) and base != ending[1:]), "")
    base = base.removesuffix(ending)
    return TITLES.get(base, base.replace("_", " ")) + MODES.get(ending, "") + (f" ({task})" if slash else "")


def change(name: str, before: float, after: float) -> str:
    """``5.10 -> 2.93 (-43 %)``; points for shares of one."""
    if is_fraction(name):
        delta = f"{100 * (after - before):+.1f} points"
    elif name.startswith("held_out_loss") and before:
        delta = f"{100 * (after - before) / before:+.0f} %"
    else:
        delta = f"{after - before:+.3f}"
    return f"{shown(name, before)} -> {shown(name, after)} ({delta})"


def split_before(name: str) -> str | None:
    """The figure's own name when ``name`` is the one before the phase, tasks included (``reward_before``)."""
    return name.removesuffix("_before") if name.endswith("_before") else None


def verdicts(metrics: Mapping[str, Any]) -> list[str]:
    """What a phase's figures say; figures of single tasks are left to the table."""
    return list(_verdicts({name: value for name, value in metrics.items() if "/" not in name and value is not None}))


def _is_detail(name: str, metrics: Mapping[str, Any], end: str) -> bool:
    """Whether another figure says the same, or more: one mode's where there is but one, a reward that is accuracy."""
    if name.startswith(DETAILS):
        return True
    if name == "accuracy_think":
        return metrics.get(f"accuracy{end}") == metrics[f"{name}{end}"]
    mode = next((mode for mode in MODES if name.endswith(mode)), None)
    twin = metrics.get(f"accuracy{mode or ''}{end}")
    return name == f"reward{mode or ''}" and twin is not None and twin == metrics.get(f"{name}{end}")


def _verdicts(metrics: Mapping[str, Any]) -> Iterator[str]:
    told: set[str] = set()
    for name in metrics:
        base = split_before(name)
        if base is None or base.startswith("rl_") or f"{base}_after" not in metrics:
            continue
        told |= {name, f"{base}_after", base}
        if _is_detail(base, metrics, "_before"):
            continue
        yield f"{title(base)}: {change(base, metrics[name], metrics[f'{base}_after'])}"
    plain, dca = metrics.get("held_out_loss_4x_plain"), metrics.get("held_out_loss_4x_dca")
    if plain is not None and dca is not None:
        word = "better" if dca < plain else "no better"
        yield f"four times the trained length: plain attention {plain:.3f}, dual chunk attention {dca:.3f}: {word}"
    for name in ("accuracy", "accuracy_think", "accuracy_no_think", "think_follow", "pair_accuracy"):
        if name in metrics and name not in told and not _is_detail(name, metrics, ""):
            yield f"{title(name)}: {shown(name, metrics[name])}"
    if "kept_fraction" in metrics:
        dropped = sum((metrics.get("dropped") or {}).values())
        yield f"{title('kept_fraction')}: {shown('kept_fraction', metrics['kept_fraction'])}, {dropped:,} dropped"
    own, rl = metrics.get("seconds_per_point"), metrics.get("rl_seconds_per_point")
    if own is not None and rl is not None:
        word = f"{rl / own:.1f} times as much" if rl > own else f"{own / rl:.1f} times less"
        yield (
            f"a point of accuracy took {own:.1f} s; reinforcement learning from the same checkpoint took {rl:.1f} s "
            f"for one, {word}"
        )
    elif own is not None:
        yield f"a point of accuracy took {own:.1f} s"
        if "rl_accuracy_after" in metrics:
            before, after = metrics.get("rl_accuracy_before", 0.0), metrics["rl_accuracy_after"]
            yield f"reinforcement learning from the same checkpoint: accuracy {change('accuracy', before, after)}"
