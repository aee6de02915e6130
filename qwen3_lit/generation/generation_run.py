"""One call of ``PagedEngine.generate``: the loop of admission, decode, sampling and what happens when a row stops.

Legend: B running sequences, V valid vocabulary, D model width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwen3_lit.errors import UserError
from qwen3_lit.generation.model_runner import ModelRunner
from qwen3_lit.generation.protocol import OnStop, OnToken, Progress
from qwen3_lit.generation.sampler import FilterTensors, SamplingTensors, sample_tokens
from qwen3_lit.generation.sampling import Completion
from qwen3_lit.generation.scheduler import Admission, PromptGroup, Scheduler
from qwen3_lit.model.transformer import Qwen3


class GenerationRun:
    """Works off the queue of ``scheduler``; ``groups`` are in the order of the prompts."""

    def __init__(
        self,
        model: Qwen3,
        scheduler: Scheduler,
        groups: Sequence[PromptGroup],
        *,
        valid_vocab: int,
        on_stop: OnStop | None = None,
        progress: Progress | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.slots = scheduler.slots
        self.cache = scheduler.cache
        self.on_stop, self.progress, self.on_token = on_stop, progress, on_token
        all_params = [g.params for g in groups]
        recording = any(p.record_routing for p in all_params)
        self.runner = ModelRunner(model, self.cache, valid_vocab, record_routing=recording)
        self.results: list[list[Completion | None]] = [[None] * p.n for p in all_params]
        self.num_samples = sum(p.n for p in all_params)
        self.num_finished = self.num_tokens = 0
        self.filters = any(p.is_filtered for p in all_params)
        self.seen_BV: Tensor | None = None
        if any(p.presence_penalty for p in all_params):
            shape = (self.slots.num_free, valid_vocab)
            self.seen_BV = torch.zeros(shape, dtype=torch.bool, device=self.cache.device)
        self._sampling: tuple[np.ndarray, SamplingTensors] | None = None

    def to_the_end(self) -> None:
        """Generate until nobody waits or runs."""
        while self.scheduler.waiting or self.scheduler.requests:
            if self.scheduler.waiting and self.slots.num_free:
                self._start(self.scheduler.admit())
            if self.scheduler.requests:
                self.scheduler.reserve_step()
                rows = self.scheduler.rows
                hidden_BD = self.runner.decode(*self.slots.step_inputs(rows, self.cache))
                self.slots.cached[rows] += 1
                self._advance(rows, hidden_BD)

    def completions(self) -> list[list[Completion]]:
        """What was generated, ``[prompt][sample]``."""
        return [[completion for completion in group if completion is not None] for group in self.results]

    def _start(self, admission: Admission) -> None:
        if not admission.slots:
            return
        computed_BD: Tensor | None = None
        if admission.prefixes:
            computed_BD = self.runner.prefill(admission.prefixes, admission.prefix_pages)
            for group, row in admission.prefilled_groups:
                group.last_hidden_D = computed_BD[row]
        if admission.copy_to:
            self.cache.copy_pages(np.array(admission.copy_from), np.array(admission.copy_to))
        hidden = []
        for source in admission.sources:
            row_D = source.last_hidden_D if isinstance(source, PromptGroup) else computed_BD[source]  # type: ignore[index]
            assert row_D is not None
            hidden.append(row_D)
        if self.seen_BV is not None:
            for slot in admission.slots:
                self.seen_BV[slot] = False
                self.seen_BV[slot, self.slots.tokens[slot, : self.slots.count[slot]]] = True
        self._advance(np.array(admission.slots), torch.stack(hidden))

    def _advance(self, rows: np.ndarray, hidden_BD: Tensor) -> None:
        """Take the next token of every row and deal with those that ended."""
        forced = self.slots.next_forced(rows)
        device = self.cache.device
        tokens_B, logprob_B = sample_tokens(
            self.runner.logits(hidden_BD),
            torch.from_numpy(self.slots.uniforms(rows)).to(device),
            self._sampling_tensors(rows),
            seen_BV=None if self.seen_BV is None else self.seen_BV[torch.from_numpy(rows).to(device)],
            forced_B=None if forced is None else torch.from_numpy(forced).to(device),
        )
        if self.seen_BV is not None:
            self.seen_BV[torch.from_numpy(rows).to(device), tokens_B.clamp_max(self.seen_BV.shape[1] - 1)] = True
        tokens = tokens_B.cpu().numpy()
        stopped, full = self.slots.append(rows, tokens, logprob_B.cpu().numpy(), forced)
        self.num_tokens += len(rows)
        if self.on_token is not None:
            for slot, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                request = self.scheduler.requests[slot]
                self.on_token(request.group.prompt_index, request.sample_index, token)
        for place in np.flatnonzero(stopped | full):
            slot = int(rows[place])
            if not (stopped[place] and not full[place] and self._continue(slot)):
                self._finish(slot, "stop" if stopped[place] else "length")

    def _continue(self, slot: int) -> bool:
        """Ask ``on_stop`` for tokens to go on with."""
        if self.on_stop is None:
            return False
        request = self.scheduler.requests[slot]
        tokens = self.on_stop(request.group.prompt_index, request.sample_index, self.slots.completion_tokens(slot))
        if not tokens:
            return False
        if min(tokens) < 0 or max(tokens) >= self.runner.model.config.vocab_size:
            raise UserError(f"on_stop: seen token ids {min(tokens)} to {max(tokens)}, expected ids of the vocabulary")
        self.slots.force(slot, tokens, new_turn=True)
        return True

    def _finish(self, slot: int, reason: str) -> None:
        request = self.scheduler.requests[slot]
        group, count = request.group, int(self.slots.count[slot])
        routes = None
        if group.params.record_routing and self.cache.routes is not None:
            cached = int(self.slots.cached[slot])
            places = self.cache.slots(self.slots.block_table[slot], cached)
            routes = self.cache.routes[torch.from_numpy(places).to(self.cache.device)].cpu()
        self.results[group.prompt_index][request.sample_index] = Completion(
            token_ids=self.slots.completion_tokens(slot),
            logprobs=self.slots.logprobs[slot, :count].tolist(),
            sampled_mask=self.slots.sampled[slot, :count].tolist(),
            finish_reason=reason,
            routed_experts=routes,
        )
        self.scheduler.end(slot)
        self.num_finished += 1
        if self.progress is not None:
            self.progress(self.num_finished, self.num_samples, self.num_tokens)

    def _sampling_tensors(self, rows: np.ndarray) -> SamplingTensors:
        if self._sampling is not None and self._sampling[0] is rows:
            return self._sampling[1]
        columns = {
            name: torch.from_numpy(getattr(self.slots, name)[rows]).to(self.cache.device)
            for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty")
        }
        temperature = self.slots.temperature[rows]
        filters = None
        if self.filters:
            filters = FilterTensors(columns["top_p"], columns["top_k"], columns["min_p"], columns["presence_penalty"])
        tensors = SamplingTensors(
            columns["temperature"], bool((temperature == 0).any()), bool((temperature > 0).any()), filters
        )
        self._sampling = (rows, tensors)
        return tensors
