"""Who runs when: admission into free slots, pages for running sequences, preemption when the cache is short.

A prompt is computed once a group: its samples share the full pages and get a copy of the last, partly filled one
(copy-on-write, done when the sample starts, because its first token is written there). Pages are handed out as
sequences grow. When none is left, prompt pages kept for samples that have not started are dropped first (the prompt is
computed again later), then the sequence that started last is preempted: it gives up its pages and waits at the head of
the queue to be computed again from its own tokens. The oldest sequence always advances, and a request that would not
fit alone is refused beforehand, so generation cannot get stuck.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from qwen3_lit.generation.kv_cache import PagedKVCache
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.generation.slots import SlotTable


@dataclass(eq=False)
class PromptGroup:
    """A prompt and what its samples share."""

    prompt_index: int
    prompt: list[int]
    params: SamplingParams
    unstarted: int
    """Samples that have not got a slot yet."""
    pages: np.ndarray | None = None
    """The prompt's pages while samples wait for them; the group owns them once."""
    last_hidden_D: Tensor | None = None
    """Hidden state of the prompt's last token, valid as long as ``pages``."""


@dataclass(eq=False)
class Request:
    """One completion to make."""

    group: PromptGroup
    sample_index: int
    key: int
    state: dict[str, Any] | None = None
    """What ``SlotTable.export`` returned, after a preemption."""

    @property
    def prefix(self) -> list[int]:
        """The tokens to compute before the next one can be sampled."""
        if self.state is None:
            return self.group.prompt
        return self.group.prompt + self.state["tokens"][: self.state["count"]].tolist()


@dataclass
class Admission:
    """Sequences that got a slot, and the work to do before they can sample."""

    slots: list[int] = field(default_factory=list)
    sources: list[PromptGroup | int] = field(default_factory=list)
    """For each slot, where its first hidden state comes from: the group, or a row of the prefill."""
    prefixes: list[list[int]] = field(default_factory=list)
    prefix_pages: list[np.ndarray] = field(default_factory=list)
    prefilled_groups: list[tuple[PromptGroup, int]] = field(default_factory=list)
    """Groups whose prompt is in this prefill, with the row."""
    copy_from: list[int] = field(default_factory=list)
    copy_to: list[int] = field(default_factory=list)
    num_tokens: int = 0


class Scheduler:
    """Owns the queue, the slots in use and their pages."""

    def __init__(self, cache: PagedKVCache, slots: SlotTable, requests: list[Request], max_prefill_tokens: int) -> None:
        self.cache = cache
        self.slots = slots
        self.waiting = deque(requests)
        self.max_prefill_tokens = max_prefill_tokens
        self.requests: dict[int, Request] = {}
        """By slot, in the order of admission."""
        self.num_preemptions = 0
        self._holders: list[PromptGroup] = []
        self._rows: np.ndarray | None = None

    @property
    def rows(self) -> np.ndarray:
        """The running slots, oldest first; the same array object until something starts or ends."""
        if self._rows is None:
            self._rows = np.fromiter(self.requests, dtype=np.int64, count=len(self.requests))
        return self._rows

    def admit(self) -> Admission:
        """Give slots and pages to waiting requests, in order, as far as both reach."""
        admission = Admission()
        while self.waiting and self.slots.num_free and self._admit_one(self.waiting[0], admission):
            self.waiting.popleft()
        return admission

    def reserve_step(self) -> None:
        """Make sure that every running sequence has a page for its next token; preempts when pages are short."""
        while True:
            rows = self.rows
            short = rows[self.slots.cached[rows] // self.cache.page_size >= self.slots.num_pages[rows]]
            if len(short) <= self.cache.allocator.num_free:
                break
            if not self._drop_waiting_prompt():
                self._preempt_youngest()
        if len(short):
            pages = self.cache.allocator.allocate(len(short))
            self.slots.block_table[short, self.slots.num_pages[short]] = pages
            self.slots.num_pages[short] += 1

    def end(self, slot: int) -> None:
        """Take a sequence off its slot and free its pages."""
        del self.requests[slot]
        self._rows = None
        self.cache.allocator.release(self.slots.block_table[slot, : self.slots.num_pages[slot]])
        self.slots.give_back(slot)

    def _admit_one(self, request: Request, admission: Admission) -> bool:
        group = request.group
        is_fork = request.state is None
        shared = is_fork and group.unstarted > 1
        prefix = request.prefix
        has_prefix = is_fork and group.pages is not None
        if not has_prefix and admission.prefixes and admission.num_tokens + len(prefix) > self.max_prefill_tokens:
            return False
        needed = 0 if has_prefix else self.cache.num_pages_for(len(prefix))
        is_partial = len(prefix) % self.cache.page_size != 0
        idle = not self.requests
        # One page for each running sequence, or the newcomer would soon be thrown out again.
        spare = 0 if idle else len(self.requests) + 1
        while needed + spare + (shared and is_partial) > self.cache.allocator.num_free:
            if not idle:
                return False
            if shared and not has_prefix:
                shared = False  # too tight to keep the prompt beside the sample: the next one computes it again
            else:
                if not self._drop_waiting_prompt():
                    raise RuntimeError("a request that does not fit alone was let through")
                has_prefix = is_fork and group.pages is not None
                needed = 0 if has_prefix else self.cache.num_pages_for(len(prefix))
        self._place(request, prefix, admission, has_prefix=has_prefix, shared=shared)
        return True

    def _place(
        self, request: Request, prefix: list[int], admission: Admission, *, has_prefix: bool, shared: bool
    ) -> None:
        group, allocator = request.group, self.cache.allocator
        if has_prefix:
            assert group.pages is not None
            pages, source = group.pages, self._group_source(group, admission)
        else:
            pages, source = allocator.allocate(self.cache.num_pages_for(len(prefix))), len(admission.prefixes)
            admission.prefixes.append(prefix)
            admission.prefix_pages.append(pages)
            admission.num_tokens += len(prefix)
        if shared:
            if not has_prefix:
                group.pages = pages
                self._holders.append(group)
                admission.prefilled_groups.append((group, len(admission.prefixes) - 1))
            num_full = len(prefix) // self.cache.page_size
            own = allocator.allocate(len(pages) - num_full)
            allocator.retain(pages[:num_full])
            admission.copy_from.extend(pages[num_full:].tolist())
            admission.copy_to.extend(own.tolist())
            pages = np.concatenate([pages[:num_full], own])
        elif has_prefix:  # the last sample takes the group's pages over
            self._holders.remove(group)
            group.pages = None
        slot = self.slots.take()
        if request.state is None:
            self.slots.start(slot, group.params, group.prompt, request.key)
            group.unstarted -= 1
        else:
            self.slots.restore(slot, request.state)
            request.state = None
        self.slots.cached[slot] = len(prefix)
        self.slots.num_pages[slot] = len(pages)
        self.slots.block_table[slot, : len(pages)] = pages
        self.requests[slot] = request
        self._rows = None
        admission.slots.append(slot)
        admission.sources.append(source)

    @staticmethod
    def _group_source(group: PromptGroup, admission: Admission) -> PromptGroup | int:
        for prefilled, row in admission.prefilled_groups:
            if prefilled is group:
                return row
        return group

    def _drop_waiting_prompt(self) -> bool:
        if not self._holders:
            return False
        group = self._holders.pop()
        assert group.pages is not None
        self.cache.allocator.release(group.pages)
        group.pages = group.last_hidden_D = None
        return True

    def _preempt_youngest(self) -> None:
        slot = next(reversed(self.requests))
        request = self.requests[slot]
        request.state = self.slots.export(slot)
        self.end(slot)
        self.waiting.appendleft(request)
        self.num_preemptions += 1
