"""Learning-rate schedules as one pure function: step -> multiplier of the base learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from qwen3_lit.errors import UserError

ScheduleKind = Literal["constant", "linear", "cosine", "wsd"]
DecayShape = Literal["linear", "cosine", "sqrt"]


@dataclass(frozen=True)
class ScheduleConfig:
    """Shape of the learning rate over a phase."""

    kind: ScheduleKind = "constant"
    """constant: no decay. linear, cosine: decay from the end of warm-up to the last step. wsd: warm-up, stable,
    decay."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up; the first step already learns at 1 / warmup_steps."""
    min_ratio: float = 0.0
    """Learning rate after the decay, as a fraction of the base."""
    decay_fraction: float = 0.1
    """wsd: share of all steps that the final decay takes."""
    decay_shape: DecayShape = "linear"
    """wsd: linear, cosine, or sqrt (1 - sqrt of the progress)."""
    total_steps: int | None = None
    """Steps that the schedule spans; null takes the trainer's max_steps."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise UserError(f"schedule.kind: got {self.kind!r}, expected one of {', '.join(get_args(ScheduleKind))}")
        if self.decay_shape not in get_args(DecayShape):
            raise UserError(
                f"schedule.decay_shape: got {self.decay_shape!r}, expected one of {', '.join(get_args(DecayShape))}"
            )
        if self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps: got {self.warmup_steps}, expected an integer >= 0")
        if not 0.0 <= self.min_ratio <= 1.0:
            raise UserError(f"schedule.min_ratio: got {self.min_ratio}, expected a number in [0, 1]")
        if not 0.0 < self.decay_fraction <= 1.0:
            raise UserError(f"schedule.decay_fraction: got {self.decay_fraction}, expected a number in (0, 1]")
        if self.total_steps is not None and self.total_steps < 1:
            raise UserError(
                f"schedule.total_steps: got {self.total_steps}, expected an integer >= 1, or null for max_steps"
            )


def check_length(config: ScheduleConfig, total_steps: int | None) -> None:
    """Refuse a schedule that does not fit the phase, before anything is trained.

    Args:
        config: the schedule.
        total_steps: optimizer steps of the phase, None when it has no end.

    Raises:
        UserError: a decaying schedule without a known length, or a warm-up that leaves no step at the full rate.
    """
    total = config.total_steps if config.total_steps is not None else total_steps
    if total is None:
        if config.kind != "constant":
            raise UserError(
                f"schedule.kind: {config.kind!r} needs a length: set trainer.max_steps or schedule.total_steps"
            )
    elif config.warmup_steps >= max(1, total):
        raise UserError(
            f"schedule.warmup_steps: got {config.warmup_steps}, expected fewer than the {total} steps of the phase "
            "(trainer.max_steps, or less data); for a run that stops early set schedule.total_steps to the whole length"
        )


def learning_rate_multiplier(step: int, config: ScheduleConfig, total_steps: int | None = None) -> float:
    """Multiplier for optimizer step ``step`` (the first is 0), in [0, 1].

    Args:
        step: optimizer steps done so far.
        config: the schedule.
        total_steps: length of the phase when ``config.total_steps`` is null. Past it the multiplier stays at min_ratio.

    Settings that do not fit each other are `check_length`'s to refuse: a step that is done is no place to fail.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    total = config.total_steps if config.total_steps is not None else total_steps
    assert total is not None, "check_length refuses a decay without a length"
    if step >= total:
        return config.min_ratio
    if config.kind == "wsd":
        decay_steps = max(1, round(config.decay_fraction * total))
        start, shape = max(config.warmup_steps, total - decay_steps), config.decay_shape
    else:
        start, shape = config.warmup_steps, config.kind
    # The last step (total - 1) still learns: the decay would reach min_ratio at step `total`.
    progress = max(0.0, (step - start) / (total - start))
    return config.min_ratio + (1.0 - config.min_ratio) * _DECAYS[shape](progress)


_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
