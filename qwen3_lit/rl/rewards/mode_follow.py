"""Rule reward: did the model think exactly when it was told to (ThinkFollow, Qwen3 report section 4.4 and Table 22)?"""

import re
from collections.abc import Sequence
from typing import Any

from qwen3_lit.rl.rewards.reward import Mode, Reward, RewardInput

_TAG = re.compile(r"(</?think>)")


def follows_mode(mode: Mode, turns: Sequence[dict[str, Any]]) -> bool:
    """Whether the assistant turns of a completion obey `mode`.

    `think` asks for a block with something in it in one of them. `no_think` asks for none in any: every block is empty
    and closed. What follows `<think>` or precedes `</think>` is a block, either tag alone makes one: thoughts behind an
    empty block are thoughts too.
    """
    thought, unclosed = False, False
    for turn in turns:
        if turn.get("role") != "assistant":
            continue
        parts = _TAG.split(str(turn["content"]))
        texts, tags = parts[::2], parts[1::2]
        for before, text, after in zip(["", *tags], texts, [*tags, ""], strict=True):
            thought |= (before == "<think>" or after == "</think>") and bool(text.strip())
        unclosed |= tags[-1:] == ["<think>"]
    return thought if mode == "think" else not (thought or unclosed)


class ModeFollowReward(Reward):
    """1 when the completion obeys the problem's `mode`, else 0; not applicable to problems without a mode.

    Args:
        weight: Weight in the composition.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics.
    """

    judges_content = False
    default_name = "mode_follow"

    def __init__(self, weight: float = 1.0, tasks: list[str] | None = None, name: str | None = None) -> None:
        super().__init__(weight, tasks, name)

    def applies(self, item: RewardInput) -> bool:
        return super().applies(item) and item.problem.get("mode") is not None

    def score(self, item: RewardInput) -> float:
        return float(follows_mode(item.problem["mode"], item.turns))
