"""Rule reward: did the model think exactly when it was told to (ThinkFollow, Qwen3 report section 4.4 and Table 22)?"""

from qwen3_lit.rl.rewards.reward import Mode, Reward, RewardInput


def follows_mode(mode: Mode, thinking: str | None) -> bool:
    """`think` asks for a think block with something in it; `no_think` for an empty block or none."""
    thought = bool(thinking and thinking.strip())
    return thought if mode == "think" else not thought


class ModeFollowReward(Reward):
    """1 when the thinking block obeys the problem's `mode`, else 0; not applicable to problems without a mode.

    Args:
        weight: Weight in the composition.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics.
    """

    default_name = "mode_follow"

    def __init__(self, weight: float = 1.0, tasks: list[str] | None = None, name: str | None = None) -> None:
        super().__init__(weight, tasks, name)

    def applies(self, item: RewardInput) -> bool:
        return super().applies(item) and item.problem.get("mode") is not None

    def score(self, item: RewardInput) -> float:
        return float(follows_mode(item.problem["mode"], item.thinking))
