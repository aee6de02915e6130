"""Rule reward: DAPO's soft penalty for overlong completions (arXiv 2503.14476, section 3.4)."""

from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.reward import Reward, RewardInput


def overlong_penalty(num_tokens: int, max_tokens: int, cache_tokens: int) -> float:
    """0 up to `max_tokens - cache_tokens`, then linear down to -1 at `max_tokens`, -1 beyond."""
    free = max_tokens - cache_tokens
    if num_tokens <= free:
        return 0.0
    return max(-1.0, (free - num_tokens) / cache_tokens)


class LengthReward(Reward):
    """Between 0 and -1, falling over the last `cache_tokens` before `max_tokens`. Meant for `composition: sum`.

    Args:
        max_tokens: Length in tokens from which the penalty is -1.
        cache_tokens: Width in tokens of the linear part.
        weight: Weight in the composition.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics.
    """

    judges_content = False
    default_name = "length"

    def __init__(
        self,
        max_tokens: int,
        cache_tokens: int,
        weight: float = 1.0,
        tasks: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, tasks, name)
        if not 0 < cache_tokens <= max_tokens:
            raise UserError(
                f"LengthReward: cache_tokens: {cache_tokens} must be between 1 and max_tokens ({max_tokens})"
            )
        self.max_tokens = max_tokens
        self.cache_tokens = cache_tokens

    def score(self, item: RewardInput) -> float:
        return overlong_penalty(item.num_tokens, self.max_tokens, self.cache_tokens)
