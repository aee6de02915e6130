"""Which rollouts are trained together, and which are kept for later.

A step's rollouts are split into minibatches (one optimizer step each) by number, and a minibatch into micro-batches
(one forward and backward each) by token budget. Both splits balance lengths. The buffer holds rollouts between steps,
refuses stale ones, and is part of the checkpoint.
"""

import heapq
import logging
import random
from collections.abc import Sequence
from typing import Any

from qwen3_lit.errors import UserError
from qwen3_lit.rl.rollout import Rollout

log = logging.getLogger(__name__)


def _balanced(lengths: Sequence[int], num_parts: int, capacity: float, max_items: int | None) -> list[list[int]] | None:
    """Longest first, each into the part that is lightest so far; None when a part would pass its capacity.

    Source: Graham's longest-processing-time rule (1969).
    """
    heap = [(0, part) for part in range(num_parts)]
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for index in sorted(range(len(lengths)), key=lambda entry: (-lengths[entry], entry)):
        full: list[tuple[int, int]] = []
        while heap and max_items is not None and len(parts[heap[0][1]]) >= max_items:
            full.append(heapq.heappop(heap))
        if not heap or heap[0][0] + lengths[index] > capacity:
            return None
        load, part = heapq.heappop(heap)
        parts[part].append(index)
        heapq.heappush(heap, (load + lengths[index], part))
    return [sorted(part) for part in parts]


def split_minibatches(rollouts: Sequence[Rollout], num_minibatches: int, seed: int) -> list[list[Rollout]]:
    """Minibatches of the same number of rollouts (give or take one) and similar token counts, each rollout once.

    A pure function of its arguments; `seed` should contain the step.

    Raises:
        UserError: If there are fewer rollouts than minibatches.
    """
    if not 1 <= num_minibatches <= len(rollouts):
        raise UserError(f"num_minibatches: {num_minibatches} must be between 1 and the {len(rollouts)} rollouts")
    order = list(range(len(rollouts)))
    random.Random(seed).shuffle(order)
    # A stable sort by length on top of the shuffle: strata of similar length, dealt out at random inside each stratum.
    order.sort(key=lambda index: rollouts[index].num_tokens, reverse=True)
    parts: list[list[int]] = [[] for _ in range(num_minibatches)]
    loads = [0] * num_minibatches
    for start in range(0, len(order), num_minibatches):
        stratum = order[start : start + num_minibatches]
        lightest = sorted(range(num_minibatches), key=lambda part: (loads[part], part))
        for part, index in zip(lightest, stratum, strict=False):
            parts[part].append(index)
            loads[part] += rollouts[index].num_tokens
    return [[rollouts[index] for index in sorted(part)] for part in parts]


def split_micro_batches(
    rollouts: Sequence[Rollout], token_budget: int, *, max_documents: int | None = None, num_at_least: int = 1
) -> list[list[Rollout]]:
    """As few micro-batches as possible with at most `token_budget` tokens each, of similar size, each rollout once.

    Args:
        rollouts: to split.
        token_budget: tokens of prompts and completions in one micro-batch.
        max_documents: rollouts in one micro-batch.
        num_at_least: number of micro-batches to reach, for ranks that have to run the same number.

    Raises:
        UserError: If one rollout alone is longer than the budget.
    """
    if not rollouts:
        return []
    lengths = [rollout.num_tokens for rollout in rollouts]
    if max(lengths) > token_budget:
        raise UserError(
            f"token budget: a rollout of {max(lengths)} tokens does not fit into micro-batches of {token_budget}; "
            "raise the budget or lower max_new_tokens"
        )
    count = max(num_at_least, -(-sum(lengths) // token_budget), -(-len(rollouts) // (max_documents or len(rollouts))))
    while True:
        parts = _balanced(lengths, min(count, len(rollouts)), token_budget, max_documents)
        if parts is not None:
            return [[rollouts[index] for index in part] for part in parts]
        count += 1


class RolloutBuffer:
    """Rollouts waiting to be trained, oldest first, whole groups only.

    Args:
        max_staleness: Optimizer steps by which the sampling policy may lag behind the trained one.
        capacity: Rollouts held at most; the oldest groups give way.
    """

    def __init__(self, max_staleness: int = 0, capacity: int | None = None) -> None:
        if max_staleness < 0 or (capacity is not None and capacity < 1):
            raise UserError(f"RolloutBuffer: max_staleness {max_staleness} must be >= 0 and capacity {capacity} >= 1")
        self.max_staleness = max_staleness
        self.capacity = capacity
        self.dropped_stale = 0
        """Rollouts thrown away for their age."""
        self.dropped_full = 0
        """Rollouts thrown away for want of room."""
        self._groups: dict[int, list[Rollout]] = {}

    def __len__(self) -> int:
        return sum(len(group) for group in self._groups.values())

    @property
    def num_groups(self) -> int:
        """Groups held."""
        return len(self._groups)

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Append whole groups.

        Raises:
            ValueError: If a group is held already: group ids must be unique over the run.
        """
        added: dict[int, list[Rollout]] = {}
        for rollout in rollouts:
            added.setdefault(rollout.group_id, []).append(rollout)
        doubled = added.keys() & self._groups.keys()
        if doubled:
            raise ValueError(f"group {min(doubled)} is in the buffer already")
        self._groups.update(added)
        while self.capacity is not None and len(self) > self.capacity and len(self._groups) > 1:
            self.dropped_full += len(self._groups.pop(next(iter(self._groups))))

    def take(self, num_groups: int, policy_version: int) -> list[Rollout]:
        """Remove and return the oldest groups, at most `num_groups`, after dropping those that are too old."""
        for group, members in list(self._groups.items()):
            if policy_version - min(rollout.policy_version for rollout in members) > self.max_staleness:
                self.dropped_stale += len(members)
                log.info("rollouts of group %d are older than %d steps and dropped", group, self.max_staleness)
                del self._groups[group]
        chosen = list(self._groups)[:num_groups]
        return [rollout for group in chosen for rollout in self._groups.pop(group)]

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint."""
        return {
            "rollouts": [rollout.state_dict() for group in self._groups.values() for rollout in group],
            "dropped_stale": self.dropped_stale,
            "dropped_full": self.dropped_full,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._groups = {}
        self.add([Rollout.from_state_dict(entry) for entry in state["rollouts"]])
        self.dropped_stale = state["dropped_stale"]
        self.dropped_full = state["dropped_full"]
