"""Rule reward: reasoning-gym's own scorer of the task a problem came from.

Several of its scorers give partial credit to any text that merely contains the answer, which a policy learns to exploit
by listing candidates; therefore only scores of at least `threshold` count, and they count 1. Two kinds of scorers need
help: the ARC boards are compared as tuples, which JSON turns into lists, and game_of_life_halting's scorer compares
``bool(text)``, which is true of any text, with the gold "False" too.
"""

from typing import Any

from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.final_answer import final_answer
from qwen3_lit.rl.rewards.reward import Reward, RewardInput

_BOARDS = ("arc_agi", "rearc")
_SCORED_AS_TEXT = "game_of_life_halting"


class ReasoningGymAnswerReward(Reward):
    """1 when reasoning-gym scores the final answer at `threshold` or above, else 0.

    Reads `problem["metadata"]` as reasoning-gym wrote it; `source_dataset` in it names the task. Not applicable to
    problems without that field, or with a dataset that reasoning-gym does not have.

    Args:
        weight: Weight in the composition.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics.
        threshold: Least score of reasoning-gym's scorer that counts as right; 1 means exact.
        max_chars: How much of the end of the answer is read.
    """

    default_name = "reasoning_gym_answer"
    measures_accuracy = True

    def __init__(
        self,
        weight: float = 1.0,
        tasks: list[str] | None = None,
        name: str | None = None,
        threshold: float = 1.0,
        max_chars: int = 4000,
    ) -> None:
        super().__init__(weight, tasks, name)
        if not 0 < threshold <= 1:
            raise UserError(f"ReasoningGymAnswerReward: threshold: {threshold} is outside (0, 1]")
        self.threshold = threshold
        self.max_chars = max_chars
        self._scorers: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scorers": {}}

    def applies(self, item: RewardInput) -> bool:
        return super().applies(item) and bool(item.metadata.get("source_dataset"))

    def prepare(self) -> None:
        import reasoning_gym  # noqa: F401  # about a second; kept outside the deadline of the first score

    def score(self, item: RewardInput) -> float | None:
        dataset = str(item.metadata["source_dataset"])
        entry = {
            "question": str(item.messages[-1]["content"]) if item.messages else "",
            "answer": item.problem.get("answer"),
            "metadata": _with_tuples(item.metadata) if dataset in _BOARDS else item.metadata,
        }
        scorer = self._scorer(dataset)
        if scorer is None:
            return None
        answer = final_answer(item.answer[-self.max_chars :])
        try:
            return float(scorer(answer, entry) >= self.threshold - 1e-9)
        except (TypeError, ValueError):
            # Some scorers parse without a net, as int("no idea"): an answer that they cannot read is wrong.
            return 0.0

    def _scorer(self, dataset: str) -> Any:
        if dataset == _SCORED_AS_TEXT:
            return _same_word
        if dataset not in self._scorers:
            from reasoning_gym.factory import DATASETS, get_score_answer_fn

            self._scorers[dataset] = get_score_answer_fn(dataset) if dataset in DATASETS else None
        return self._scorers[dataset]


def _with_tuples(metadata: dict[str, Any]) -> dict[str, Any]:
    return {**metadata, "output": tuple(tuple(row) for row in metadata["output"])}


def _same_word(answer: str, entry: dict[str, Any]) -> float:
    return float(answer.strip().rstrip(".").lower() == str(entry["answer"]).lower())
