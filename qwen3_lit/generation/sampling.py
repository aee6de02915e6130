"""What is asked of a rollout engine and what it hands back: sampling parameters and completions.

Legend: L MoE layers, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qwen3_lit.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How the completions of one prompt are drawn.

    Reinforcement learning samples the full distribution (temperature 1, no top-p, no top-k): truncating it biases
    the importance ratio. The filters serve evaluation. Filters apply in the order presence penalty, temperature,
    top-k, top-p, min-p. Log-probs always refer to the distribution at the sampling temperature before the presence
    penalty and before any filter; greedy decoding (temperature 0) reports them at temperature 1.
    """

    max_new_tokens: int = 1024
    """Upper bound on the tokens of one completion, forced tokens and the stop token included."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token, ties go to the lower id."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one; 0 drops none."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that is already in the completion."""
    n: int = 1
    """Completions a prompt; the prompt is computed once for all of them."""
    stop_token_ids: tuple[int, ...] = ()
    """A sampled token of this set ends the completion and is its last token."""
    thinking_budget: int | None = None
    """Most tokens inside the think block before the stop sentence is spliced in; null means no limit."""
    record_routing: bool = False
    """Return the experts that each token was routed to."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0 <= self.min_p < 1, "min_p", self.min_p, "at least 0 and below 1")
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "between -2 and 2")
        _require(self.n >= 1, "n", self.n, "at least 1")
        budget = self.thinking_budget
        _require(budget is None or budget >= 0, "thinking_budget", budget, "null or 0 or more tokens")

    @property
    def is_filtered(self) -> bool:
        """Whether sampling leaves the plain softmax at the sampling temperature."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.presence_penalty != 0


def _require(condition: bool, name: str, seen: object, expected: str) -> None:
    if not condition:
        raise UserError(f"SamplingParams.{name}: seen {seen!r}, expected {expected}")


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt."""

    token_ids: list[int]
    """The continuation, forced tokens and the closing stop token included."""
    logprobs: list[float]
    """Natural log-probability of each token at the sampling temperature over the valid vocabulary, one a token.
    The in-process engine computes those of forced tokens too; server engines put 0.0 there."""
    sampled_mask: list[bool]
    """False where the token was forced (stop-thinking sentence, tool result) and must not be trained on."""
    finish_reason: str
    """"stop" (a stop token was sampled) or "length" (max_new_tokens, or a server's context, is full)."""
    routed_experts: Tensor | None = None
    """uint8 [tokens, L, K] on the CPU, tokens = len(prompt) + len(token_ids) - 1: row t holds the experts of the token
    at position t of prompt + completion, for every token that was fed to the model. The last token of the completion
    is never fed, so it has no row; a trainer that packs prompt + completion needs one more row there, and may take any
    expert ids because no loss hangs on that position."""


def per_prompt_params(params: SamplingParams | Sequence[SamplingParams], num_prompts: int) -> list[SamplingParams]:
    """One ``SamplingParams`` a prompt. Raises UserError when a list of another length is given."""
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise UserError(f"params: seen {len(params)} SamplingParams for {num_prompts} prompts, expected one each")
    return list(params)
