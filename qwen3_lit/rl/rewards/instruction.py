"""Rule reward: does the answer obey its verifiable instructions (IFEval's strict scoring)?"""

from qwen3_lit.rl.rewards.instruction_checks import check_holds
from qwen3_lit.rl.rewards.reward import Reward, RewardInput


class InstructionReward(Reward):
    """1 when all of `metadata.checks` hold, else 0; with `partial` the fraction that holds.

    Not applicable to problems without checks. The kinds of checks are listed in
    :mod:`qwen3_lit.rl.rewards.instruction_checks`.

    Args:
        weight: Weight in the composition.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics.
        partial: Give credit for each instruction rather than for all of them together.
    """

    default_name = "instruction"
    measures_accuracy = True

    def __init__(
        self, weight: float = 1.0, tasks: list[str] | None = None, name: str | None = None, partial: bool = False
    ) -> None:
        super().__init__(weight, tasks, name)
        self.partial = partial

    def applies(self, item: RewardInput) -> bool:
        return super().applies(item) and bool(item.metadata.get("checks"))

    def score(self, item: RewardInput) -> float:
        held = [check_holds(item.answer, spec) for spec in item.metadata["checks"]]
        return sum(held) / len(held) if self.partial else float(all(held))
