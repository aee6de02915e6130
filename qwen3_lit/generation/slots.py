"""The bookkeeping of all running completions as arrays, one row a slot, so that a decode step has no loop over them.

Legend: B slots, M pages a sequence. Everything lives on the host in numpy: lengths, page numbers and random numbers are
known before a step; only the tokens come back from the device.
"""

from typing import Any

import numpy as np

from qwen3_lit.generation.kv_cache import PagedKVCache
from qwen3_lit.generation.sampler import draw_uniforms
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.generation.thinking import THINKING, UNLIMITED, ThinkingTokens

_NO_TOKEN = -1


class SlotTable:
    """State of ``num_slots`` completions; a method works on the slots in its ``rows`` argument at once."""

    def __init__(
        self, num_slots: int, max_pages: int, all_params: list[SamplingParams], thinking: ThinkingTokens | None
    ) -> None:
        longest = max(p.max_new_tokens for p in all_params)
        most_stops = max(1, *(len(p.stop_token_ids) for p in all_params))
        self.has_budgets = any(p.thinking_budget is not None for p in all_params)
        self._thinking = thinking if self.has_budgets else None
        integers = {name: np.zeros(num_slots, dtype=np.int64) for name in _INTEGER_COLUMNS}
        floats = {name: np.zeros(num_slots, dtype=np.float32) for name in _FLOAT_COLUMNS}
        self._columns: dict[str, np.ndarray] = {
            **integers,
            **floats,
            "tokens": np.zeros((num_slots, longest), dtype=np.int64),
            "logprobs": np.zeros((num_slots, longest), dtype=np.float32),
            "sampled": np.zeros((num_slots, longest), dtype=bool),
            "stop_ids": np.full((num_slots, most_stops), _NO_TOKEN, dtype=np.int64),
            "forced": np.full((num_slots, 8), _NO_TOKEN, dtype=np.int64),
        }
        self.block_table = np.zeros((num_slots, max_pages), dtype=np.int32)
        self._free = list(range(num_slots - 1, -1, -1))

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["_columns"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A free slot."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Free a slot; its pages are the caller's to release."""
        self._free.append(slot)

    def start(self, slot: int, params: SamplingParams, prompt: list[int], key: int) -> None:
        """Set ``slot`` to the beginning of a completion of ``prompt``."""
        for column in self._columns.values():
            column[slot] = 0
        self.stop_ids[slot] = _NO_TOKEN
        self.stop_ids[slot, : len(params.stop_token_ids)] = params.stop_token_ids
        for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty"):
            self._columns[name][slot] = getattr(params, name)
        self.key[slot] = key
        self.limit[slot] = params.max_new_tokens
        self.budget[slot] = UNLIMITED if params.thinking_budget is None else params.thinking_budget
        if self._thinking is not None:
            self.think_state[slot], self.think_count[slot] = self._thinking.after_prompt(prompt)
            self._splice_over_budget(np.array([slot]))

    def export(self, slot: int) -> dict[str, Any]:
        """Everything about a completion but its pages, to take it up again in another slot."""
        return {name: column[slot].copy() for name, column in self._columns.items()}

    def restore(self, slot: int, state: dict[str, Any]) -> None:
        """The inverse of ``export``."""
        self._widen_forced(len(state["forced"]))
        for name, value in state.items():
            if name == "forced":
                self.forced[slot, : len(value)] = value
            else:
                self._columns[name][slot] = value

    def completion_tokens(self, slot: int) -> list[int]:
        """The completion so far."""
        return self.tokens[slot, : self.count[slot]].tolist()

    def next_forced(self, rows: np.ndarray) -> np.ndarray | None:
        """The token that each row must take next, -1 where it is free to sample; None when all rows are."""
        waiting = self.forced_next[rows] < self.forced_end[rows]
        if not waiting.any():
            return None
        places = np.where(waiting, self.forced_next[rows], 0)
        return np.where(waiting, self.forced[rows, places], _NO_TOKEN)

    def uniforms(self, rows: np.ndarray) -> np.ndarray:
        """The random number of each row's next token."""
        return draw_uniforms(self.key[rows], self.count[rows])

    def append(
        self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, forced: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take one token a row; returns which rows sampled a stop token and which are full."""
        is_forced = np.zeros(len(rows), dtype=bool) if forced is None else forced >= 0
        place = self.count[rows]
        self.tokens[rows, place] = tokens
        self.logprobs[rows, place] = logprobs
        self.sampled[rows, place] = ~is_forced
        self.count[rows] = place + 1
        self.forced_next[rows] += is_forced
        if self._thinking is not None:
            state, count = self.think_state[rows], self.think_count[rows]
            self._thinking.advance(state, count, tokens)
            self.think_state[rows], self.think_count[rows] = state, count
            self._splice_over_budget(rows)
        stopped = ~is_forced & (tokens[:, None] == self.stop_ids[rows]).any(1)
        return stopped, self.count[rows] >= self.limit[rows]

    def force(self, slot: int, token_ids: list[int], *, new_turn: bool) -> None:
        """Queue tokens that ``slot`` must take next, in place of any that were queued."""
        self._widen_forced(len(token_ids))
        self.forced[slot, : len(token_ids)] = token_ids
        self.forced_next[slot], self.forced_end[slot] = 0, len(token_ids)
        if new_turn and self._thinking is not None:
            self.think_state[slot], self.think_count[slot] = self._thinking.first_state, 0

    def step_inputs(self, rows: np.ndarray, cache: PagedKVCache) -> tuple[np.ndarray, np.ndarray]:
        """``(int64 [4, B], int32 [B, M])``: tokens, positions, slots in the cache, context lengths; block table."""
        position = self.cached[rows]
        page, offset = np.divmod(position, cache.page_size)
        cache_slot = self.block_table[rows, page].astype(np.int64) * cache.page_size + offset
        last_token = self.tokens[rows, self.count[rows] - 1]
        return np.stack([last_token, position, cache_slot, position + 1]), self.block_table[rows, : int(page.max()) + 1]

    def _splice_over_budget(self, rows: np.ndarray) -> None:
        assert self._thinking is not None
        over = (self.think_state[rows] == THINKING) & (self.think_count[rows] >= self.budget[rows])
        over &= self.forced_next[rows] >= self.forced_end[rows]
        if not over.any():
            return
        stop_ids = self._thinking.stop_thinking_ids
        self._widen_forced(len(stop_ids))
        late = rows[over]
        self.forced[late, : len(stop_ids)] = stop_ids
        self.forced_next[late], self.forced_end[late] = 0, len(stop_ids)

    def _widen_forced(self, width: int) -> None:
        missing = width - self.forced.shape[1]
        if missing > 0:
            self._columns["forced"] = np.pad(self.forced, ((0, 0), (0, missing)), constant_values=_NO_TOKEN)


_INTEGER_COLUMNS = (
    "key",  # of the random stream
    "num_pages",  # pages held
    "cached",  # tokens whose keys and values are in the cache
    "count",  # tokens of the completion
    "limit",  # max_new_tokens
    "budget",  # thinking tokens allowed
    "think_state",
    "think_count",
    "forced_next",  # place in ``forced`` of the next forced token
    "forced_end",
    "top_k",
)
_FLOAT_COLUMNS = ("temperature", "top_p", "min_p", "presence_penalty")
