"""Rule reward: is the completion well-formed thinking followed by an answer?"""

from qwen3_lit.rl.rewards.reward import Reward, RewardInput

_OPEN, _CLOSE = "<think>", "</think>"


def is_well_formed(text: str) -> bool:
    """One think block at the very start, closed, never reopened, and a non-empty answer behind it."""
    if text.count(_OPEN) != 1 or text.count(_CLOSE) != 1 or not text.startswith(_OPEN):
        return False
    return bool(text.partition(_CLOSE)[2].strip())


class FormatReward(Reward):
    """1 when every assistant turn is one think block (empty or not) and a non-empty answer, else 0.

    Args:
        weight: Weight in the composition.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics.
    """

    judges_content = False
    default_name = "format"

    def __init__(self, weight: float = 1.0, tasks: list[str] | None = None, name: str | None = None) -> None:
        super().__init__(weight, tasks, name)

    def score(self, item: RewardInput) -> float:
        turns = [str(turn["content"]) for turn in item.turns if turn.get("role") == "assistant"] or [item.completion]
        return float(all(is_well_formed(turn) for turn in turns))
