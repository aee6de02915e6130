"""The in-process rollout engine: paged cache, prompts computed once a group, continuous refill, forced tokens.

It runs on the trainer's own parameters; there is no second copy and nothing to synchronise. The loop is: admit waiting
requests into free slots (packed prefill), feed one token of every running sequence, sample, and look at the sequences
that stopped. A sequence that ends hands its slot to the next one in the same step.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from qwen3_kernels import dispatch

from qwen3_lit.errors import UserError
from qwen3_lit.generation.generation_run import GenerationRun
from qwen3_lit.generation.kv_cache import PagedKVCache
from qwen3_lit.generation.protocol import OnStop, OnToken, Progress
from qwen3_lit.generation.sampling import Completion, SamplingParams, per_prompt_params
from qwen3_lit.generation.scheduler import PromptGroup, Request, Scheduler
from qwen3_lit.generation.slots import SlotTable
from qwen3_lit.generation.thinking import ThinkingTokens
from qwen3_lit.model.transformer import Qwen3

log = logging.getLogger(__name__)


class PagedEngine:
    """Generates with a ``Qwen3`` that stays where it is.

    Args:
        model: put into eval mode while generating, and back afterwards.
        page_size: tokens a page of the cache.
        max_batch_size: most sequences that decode together.
        max_cached_tokens: size of the cache in tokens; bounds memory at
            ``2 * layers * kv heads * head_dim * bytes`` a token.
        max_prefill_tokens: most prompt tokens in one forward pass; a longer prompt goes alone.
        valid_vocab: ids from here on belong to no token and are never produced; default: all rows of the embedding.
        stop_token_ids: end a completion in addition to those that a request names.
        thinking: needed for thinking budgets.
        seed: of the engine's own random stream.
    """

    def __init__(
        self,
        model: Qwen3,
        *,
        page_size: int = 16,
        max_batch_size: int = 256,
        max_cached_tokens: int = 131072,
        max_prefill_tokens: int = 8192,
        valid_vocab: int | None = None,
        stop_token_ids: Sequence[int] = (),
        thinking: ThinkingTokens | None = None,
        seed: int = 0,
    ) -> None:
        vocab_size = model.config.vocab_size
        for name, value in (("page_size", page_size), ("max_batch_size", max_batch_size)):
            if value < 1:
                raise UserError(f"PagedEngine.{name}: seen {value}, expected at least 1")
        if max_cached_tokens < page_size:
            raise UserError(f"PagedEngine.max_cached_tokens: seen {max_cached_tokens}, expected a page of {page_size}")
        if valid_vocab is not None and not 1 <= valid_vocab <= vocab_size:
            raise UserError(
                f"PagedEngine.valid_vocab: seen {valid_vocab}, expected 1 to the model's vocab_size {vocab_size}; "
                f"does the tokenizer belong to this model?"
            )
        self.model = model
        self.page_size = page_size
        self.max_batch_size = max_batch_size
        self.max_cached_tokens = max_cached_tokens
        self.max_prefill_tokens = max_prefill_tokens
        self.valid_vocab = vocab_size if valid_vocab is None else valid_vocab
        self.stop_token_ids = tuple(stop_token_ids)
        self.thinking = thinking
        self.generator = torch.Generator().manual_seed(seed)
        self.num_preemptions = 0
        self._cache: PagedKVCache | None = None

    @classmethod
    def for_tokenizer(cls, model: Qwen3, tokenizer: Any, **options: Any) -> "PagedEngine":
        """An engine whose special tokens are those of a ``TextTokenizer`` (see ``qwen3_lit.data.tokenizer``)."""
        defaults = {
            "valid_vocab": len(tokenizer),
            "stop_token_ids": (tokenizer.im_end_id, tokenizer.end_of_text_id),
            "thinking": ThinkingTokens.of(tokenizer),
        }
        return cls(model, **{**defaults, **options})

    def reseed(self, seed: int) -> None:
        """See ``RolloutEngine``."""
        self.generator.manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """The random stream: a restored engine draws the same samples."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.generator.set_state(state["generator"].cpu())

    def release_cache(self) -> None:
        """Free the cache's memory; the next ``generate`` makes a new one."""
        self._cache = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        on_stop: OnStop | None = None,
        progress: Progress | None = None,
        on_token: OnToken | None = None,
    ) -> list[list[Completion]]:
        """Complete every prompt ``n`` times; result ``[prompt][sample]``.

        A completion depends on its prompt, its params and its place ``(prompt, sample)`` in this call, not on what else
        is in the batch nor on the size of batch and cache, up to float rounding.

        Raises:
            UserError: empty prompt, token id out of range, or a request that can never fit into the cache.
        """
        all_params = per_prompt_params(params, len(prompts))
        if not prompts:
            return []
        cache = self._ready_cache()
        groups = [
            PromptGroup(index, list(prompt), self._checked(index, prompt, p, cache), p.n)
            for index, (prompt, p) in enumerate(zip(prompts, all_params, strict=True))
        ]
        num_samples = sum(p.n for p in all_params)
        keys = iter(torch.randint(-(2**62), 2**62, (num_samples,), generator=self.generator).tolist())
        requests = [Request(group, sample, next(keys)) for group in groups for sample in range(group.params.n)]
        max_pages = max(cache.num_pages_for(len(g.prompt) + g.params.max_new_tokens) for g in groups)
        slots = SlotTable(self.max_batch_size, max_pages, [g.params for g in groups], self.thinking)
        scheduler = Scheduler(cache, slots, requests, self.max_prefill_tokens)
        run = GenerationRun(
            self.model,
            scheduler,
            groups,
            valid_vocab=self.valid_vocab,
            on_stop=on_stop,
            progress=progress,
            on_token=on_token,
        )
        was_training = self.model.training
        self.model.eval()
        try:
            run.to_the_end()
        except BaseException:
            self._cache = None  # interrupted: pages are still owned by sequences that nobody will finish
            raise
        finally:
            self.model.train(was_training)
        self.num_preemptions += scheduler.num_preemptions
        if scheduler.num_preemptions:
            log.info(
                "cache of %d tokens was short: %d sequences were computed again; a larger max_cached_tokens is faster",
                self.max_cached_tokens,
                scheduler.num_preemptions,
            )
        return run.completions()

    def _ready_cache(self) -> PagedKVCache:
        weight = self.model.embed_tokens.weight
        dtype = dispatch.autocast(weight[:0]).dtype  # of the keys and values that the model computes
        cache = self._cache
        if cache is None or cache.dtype != dtype or cache.device != weight.device:
            config = self.model.config
            self._cache = cache = PagedKVCache(
                num_layers=config.num_hidden_layers,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                num_pages=self.max_cached_tokens // self.page_size,
                page_size=self.page_size,
                dtype=dtype,
                device=weight.device,
            )
        return cache

    def _checked(
        self, index: int, prompt: Sequence[int], params: SamplingParams, cache: PagedKVCache
    ) -> SamplingParams:
        where = f"prompt {index}"
        if not len(prompt):
            raise UserError(f"{where}: seen no token, expected at least one; render it through the chat template")
        lowest, highest = min(prompt), max(prompt)
        if lowest < 0 or highest >= self.model.config.vocab_size:
            bad = lowest if lowest < 0 else highest
            raise UserError(
                f"{where}: seen token id {bad}, expected 0 to {self.model.config.vocab_size - 1}; "
                f"does the tokenizer belong to this model?"
            )
        needed = len(prompt) + params.max_new_tokens - 1  # the last token is never fed
        if cache.num_pages_for(needed) > cache.allocator.num_pages:
            raise UserError(
                f"{where}: {len(prompt)} tokens and max_new_tokens {params.max_new_tokens} need a cache of {needed} "
                f"tokens, seen max_cached_tokens {self.max_cached_tokens}; raise it, or lower max_new_tokens"
            )
        if params.thinking_budget is not None and self.thinking is None:
            raise UserError(f"{where}: thinking_budget is set, expected an engine with end_think_id, stop_thinking_ids")
        if params.record_routing and self.model.config.num_experts > 256:
            raise UserError(
                f"{where}: record_routing: seen {self.model.config.num_experts} experts, expected at most 256"
            )
        stops = tuple(dict.fromkeys((*params.stop_token_ids, *self.stop_token_ids)))
        return params if stops == params.stop_token_ids else replace(params, stop_token_ids=stops)
