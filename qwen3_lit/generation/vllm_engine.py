"""A ``RolloutEngine`` on vLLM's offline engine, for those who have it: ``pip install 'qwen3_lit[vllm]'``.

vLLM loads a Hugging Face folder of its own; after an update of the trainer's weights, export and ``reload``.
"""

import random
from collections.abc import Sequence
from typing import Any

from qwen3_lit.errors import UserError
from qwen3_lit.generation.protocol import OnStop, Progress
from qwen3_lit.generation.sampling import Completion, SamplingParams, per_prompt_params
from qwen3_lit.generation.segments import Segment, SegmentRequest, generate_in_segments, never_sampled
from qwen3_lit.generation.thinking import ThinkingTokens


def _import_vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            "VLLMEngine: the package vllm is not installed; pip install 'qwen3_lit[vllm]', or use PagedEngine"
        ) from error
    return vllm


class VLLMEngine:
    """Completions by vLLM in this process.

    Args:
        model_path: Hugging Face folder to load.
        stop_token_ids: end a completion in addition to those that a request names.
        thinking: needed for thinking budgets.
        unused_token_ids: rows of the model's embedding that are no token, ``range(len(tokenizer), vocab_size)``; their
            logits were never trained, and without this vLLM may sample them.
        seed: of the stream that request seeds are drawn from.
        options: further arguments of ``vllm.LLM``, such as ``gpu_memory_utilization``.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(
        self,
        model_path: str,
        *,
        stop_token_ids: Sequence[int] = (),
        thinking: ThinkingTokens | None = None,
        unused_token_ids: Sequence[int] = (),
        seed: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._vllm = _import_vllm()
        self.stop_token_ids = tuple(stop_token_ids)
        self.thinking = thinking
        self.logit_bias = never_sampled(unused_token_ids)
        self.options = dict(options or {})
        self._random = random.Random(seed)
        self.reload(model_path)

    def reload(self, model_path: str) -> None:
        """Load weights from another folder in place of the present ones."""
        self._llm: Any = None  # frees the old weights before the new ones are read
        # processed_logprobs: at the sampling temperature, as training needs them.
        self._llm = self._vllm.LLM(
            model=model_path, skip_tokenizer_init=True, logprobs_mode="processed_logprobs", **self.options
        )

    def reseed(self, seed: int) -> None:
        """See ``RolloutEngine``."""
        self._random.seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """The stream of request seeds."""
        return {"random": self._random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        on_stop: OnStop | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See ``RolloutEngine``. With top-p, top-k, min-p or a penalty, log-probs are those after the filters."""
        all_params = per_prompt_params(params, len(prompts))
        seeds = [self._random.randrange(2**31) for _ in range(sum(p.n for p in all_params))]
        return generate_in_segments(self._complete, prompts, all_params, seeds, self.thinking, on_stop, progress)

    def _complete(self, requests: list[SegmentRequest]) -> list[Segment]:
        sampling = [
            self._vllm.SamplingParams(
                n=1,
                max_tokens=request.max_tokens,
                temperature=request.params.temperature,
                top_p=request.params.top_p,
                top_k=request.params.top_k,
                min_p=request.params.min_p,
                presence_penalty=request.params.presence_penalty,
                stop_token_ids=[*request.params.stop_token_ids, *self.stop_token_ids],
                ignore_eos=True,  # only the stop tokens asked for end a completion
                seed=request.seed,
                logit_bias=self.logit_bias or None,
                logprobs=0,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.token_ids} for request in requests]
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        segments = []
        for request, output in zip(requests, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            logprobs = [step[token].logprob for token, step in zip(tokens, output.outputs[0].logprobs, strict=True)]
            stops = {*request.params.stop_token_ids, *self.stop_token_ids}
            segments.append(Segment(tokens, logprobs, bool(tokens) and tokens[-1] in stops))
        return segments
