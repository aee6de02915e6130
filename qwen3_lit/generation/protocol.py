"""The seam between rollouts and whatever produces them: the in-process engine, vLLM or an OpenAI-compatible server."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from qwen3_lit.generation.sampling import Completion, SamplingParams

OnStop = Callable[[int, int, list[int]], list[int] | None]
"""``on_stop(prompt_index, sample_index, token_ids)``, called when a stop token was sampled and room is left. The tokens
it returns are forced and generation goes on after them in the same cache; None (or an empty list) ends the
completion."""

Progress = Callable[[int, int, int], None]
"""``progress(finished_completions, all_completions, generated_tokens)``, called each time a completion ends."""


OnToken = Callable[[int, int, int], None]
"""``on_token(prompt_index, sample_index, token_id)`` for every token as it is taken, forced ones included."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Token ids in, token ids and log-probs out. Nothing is decoded and encoded again on the way."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        on_stop: OnStop | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Completions as ``[prompt][sample]``, in the order of the prompts."""
        ...

    def reseed(self, seed: int) -> None:
        """Start the random stream anew; seeds are below 2**63."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved for the next call to draw the same samples after a resume."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        ...
