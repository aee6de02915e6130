"""Thinking budget and tool results on top of servers that only complete prompts.

A server completes token ids until a stop token or a length. Forced tokens are spliced between such segments: the next
segment's prompt is everything so far. All sequences that need a segment are asked for together, round after round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen3_lit.errors import UserError
from qwen3_lit.generation.protocol import OnStop, Progress
from qwen3_lit.generation.sampling import Completion, SamplingParams
from qwen3_lit.generation.thinking import OPEN, THINKING, ThinkingTokens


@dataclass
class SegmentRequest:
    """Complete ``token_ids`` once by at most ``max_tokens`` tokens."""

    token_ids: list[int]
    max_tokens: int
    params: SamplingParams
    seed: int


@dataclass
class Segment:
    """What the server added, the stop token included when one was sampled."""

    token_ids: list[int]
    logprobs: list[float]
    stopped: bool


def never_sampled(token_ids: Sequence[int]) -> dict[int, float]:
    """A logit bias that leaves the tokens less than e^-100 of their odds: -100 is the least that servers take."""
    return dict.fromkeys(token_ids, -100.0)


@dataclass
class _Sequence:
    prompt_index: int
    sample_index: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    think_state: int
    think_count: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def room(self) -> int:
        return self.params.max_new_tokens - len(self.token_ids)


def generate_in_segments(
    complete: Callable[[list[SegmentRequest]], list[Segment]],
    prompts: Sequence[Sequence[int]],
    all_params: Sequence[SamplingParams],
    seeds: Sequence[int],
    thinking: ThinkingTokens | None,
    on_stop: OnStop | None,
    progress: Progress | None,
) -> list[list[Completion]]:
    """Completions as ``[prompt][sample]``; ``seeds`` holds one a completion. Forced tokens get the log-prob 0.0."""
    sequences: list[_Sequence] = []
    for index, (prompt, params) in enumerate(zip(prompts, all_params, strict=True)):
        if params.record_routing:
            raise UserError(f"prompt {index}: record_routing: only the in-process PagedEngine records routed experts")
        if params.thinking_budget is not None and thinking is None:
            raise UserError(f"prompt {index}: thinking_budget is set, expected an engine with thinking tokens")
        if params.presence_penalty and (params.thinking_budget is not None or on_stop is not None):
            raise UserError(
                f"prompt {index}: presence_penalty: seen {params.presence_penalty}, expected 0 with a thinking_budget "
                "or tools: a server forgets what it wrote before the forced tokens; use PagedEngine"
            )
        state, count = (OPEN, 0) if thinking is None else thinking.after_prompt(prompt)
        for sample in range(params.n):
            seed = seeds[len(sequences)]
            sequences.append(_Sequence(index, sample, list(prompt), params, seed, state, count))
            _splice_over_budget(sequences[-1], thinking)
    _run_rounds(complete, sequences, thinking, on_stop, progress)
    results: list[list[Completion]] = [[] for _ in prompts]
    for s in sequences:
        results[s.prompt_index].append(Completion(s.token_ids, s.logprobs, s.sampled, s.finish_reason or "length"))
    return results


def _run_rounds(
    complete: Callable[[list[SegmentRequest]], list[Segment]],
    sequences: list[_Sequence],
    thinking: ThinkingTokens | None,
    on_stop: OnStop | None,
    progress: Progress | None,
) -> None:
    waiting = [s for s in sequences if s.finish_reason is None]
    rounds = 0
    while waiting:
        requests = [
            SegmentRequest(s.prompt + s.token_ids, _segment_limit(s), s.params, (s.seed + rounds) % 2**31)
            for s in waiting
        ]
        for sequence, request, segment in zip(waiting, requests, complete(requests), strict=True):
            over_budget = _extend(sequence, segment.token_ids, segment.logprobs, thinking, forced=False)
            if segment.stopped and not over_budget:
                _after_stop(sequence, thinking, on_stop)
            elif sequence.room <= 0 or (len(segment.token_ids) < request.max_tokens and not over_budget):
                sequence.finish_reason = "length"  # fewer tokens than asked for: the server's context is full
            _splice_over_budget(sequence, thinking)
        waiting = [s for s in waiting if s.finish_reason is None]
        rounds += 1
        if progress is not None:
            tokens = sum(len(s.token_ids) for s in sequences)
            progress(len(sequences) - len(waiting), len(sequences), tokens)


def _segment_limit(sequence: _Sequence) -> int:
    budget = sequence.params.thinking_budget
    if budget is None:
        return sequence.room
    if sequence.think_state == THINKING:
        return min(sequence.room, budget - sequence.think_count)
    starts_turn = not (sequence.sampled and sequence.sampled[-1])
    if sequence.think_state == OPEN and starts_turn:
        return min(sequence.room, budget + 1)  # the tag is not counted
    # A block may still open, but a turn that began without one hardly does: steps of budget + 1 tokens would be a
    # request a token for a budget of 0. What is thought beyond the budget is left out.
    return sequence.room


def _after_stop(sequence: _Sequence, thinking: ThinkingTokens | None, on_stop: OnStop | None) -> None:
    forced = None
    if on_stop is not None and sequence.room > 0:
        forced = on_stop(sequence.prompt_index, sequence.sample_index, list(sequence.token_ids))
    if not forced:
        sequence.finish_reason = "stop"
        return
    if thinking is not None:
        sequence.think_state, sequence.think_count = thinking.first_state, 0
    _force(sequence, forced, thinking)


def _splice_over_budget(sequence: _Sequence, thinking: ThinkingTokens | None) -> None:
    budget = sequence.params.thinking_budget
    if thinking is None or budget is None or sequence.finish_reason is not None:
        return
    if sequence.think_state == THINKING and sequence.think_count >= budget:
        _force(sequence, list(thinking.stop_thinking_ids), thinking)


def _force(sequence: _Sequence, token_ids: list[int], thinking: ThinkingTokens | None) -> None:
    token_ids = token_ids[: sequence.room]
    _extend(sequence, token_ids, [0.0] * len(token_ids), thinking, forced=True)
    if sequence.room <= 0:
        sequence.finish_reason = "length"


def _extend(
    sequence: _Sequence, token_ids: list[int], logprobs: list[float], thinking: ThinkingTokens | None, *, forced: bool
) -> bool:
    """Take the tokens, sampled ones up to the thinking budget. Whether some were left out."""
    budget, taken = sequence.params.thinking_budget, len(token_ids)
    if thinking is not None:
        state, count = np.array([sequence.think_state]), np.array([sequence.think_count])
        for index, token in enumerate(token_ids):
            thinking.advance(state, count, np.array([token]))
            if budget is not None and not forced and state[0] == THINKING and count[0] >= budget:
                taken = index + 1
                break
        sequence.think_state, sequence.think_count = int(state[0]), int(count[0])
    sequence.token_ids += token_ids[:taken]
    sequence.logprobs += logprobs[:taken]
    sequence.sampled += [not forced] * taken
    return taken < len(token_ids)
