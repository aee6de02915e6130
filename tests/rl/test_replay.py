"""Splits lose nothing and keep their limits; the buffer survives a checkpoint and refuses what is stale."""

import io

import pytest
import torch

from qwen3_lit.errors import UserError
from qwen3_lit.rl.replay import RolloutBuffer, split_micro_batches, split_minibatches
from qwen3_lit.rl.rollout import Rollout


def make(length: int, group: int = 0, version: int = 0) -> Rollout:
    size = length - 1
    experts = torch.full((size, 1, 2), group % 256, dtype=torch.uint8)
    return Rollout(
        *([1], [2] * size, [-1.0] * size, [True] * size, "stop", "think", group, {"answer": "x"}),
        policy_version=version,
        routed_experts=experts,
    )


LENGTHS = [int(x) for x in torch.randint(5, 100, (61,), generator=torch.Generator().manual_seed(1))]
ROLLOUTS = [make(length, index) for index, length in enumerate(LENGTHS)]


def identities(parts: list[list[Rollout]]) -> list[int]:
    return sorted(rollout.group_id for part in parts for rollout in part)


def test_minibatches_are_even_in_number_and_close_in_tokens() -> None:
    parts = split_minibatches(ROLLOUTS, 4, seed=3)
    assert identities(parts) == list(range(61))
    assert {len(part) for part in parts} == {15, 16}
    loads = [sum(rollout.num_tokens for rollout in part) for part in parts]
    assert max(loads) - min(loads) <= max(LENGTHS)
    assert split_minibatches(ROLLOUTS, 4, seed=3) == parts
    assert [r.group_id for r in split_minibatches(ROLLOUTS, 4, seed=4)[0]] != [r.group_id for r in parts[0]]
    with pytest.raises(UserError, match="num_minibatches"):
        split_minibatches(ROLLOUTS[:3], 4, seed=0)


@pytest.mark.parametrize("budget", [100, 150, 1000, 10_000])
@pytest.mark.parametrize("max_documents", [None, 1, 7])
def test_micro_batches_keep_their_budget_and_lose_nothing(budget: int, max_documents: int | None) -> None:
    parts = split_micro_batches(ROLLOUTS, budget, max_documents=max_documents)
    assert identities(parts) == list(range(61)) and all(parts)
    loads = [sum(rollout.num_tokens for rollout in part) for part in parts]
    assert max(loads) <= budget
    assert all(len(part) <= (max_documents or 61) for part in parts)
    if max_documents is None and budget >= 1000:
        assert len(parts) == -(-sum(LENGTHS) // budget), "as few as can be"
        assert max(loads) - min(loads) <= max(LENGTHS)


def test_ranks_can_ask_for_the_same_number_of_micro_batches() -> None:
    assert len(split_micro_batches(ROLLOUTS, 10_000, num_at_least=5)) == 5


def test_a_rollout_longer_than_the_budget_is_named() -> None:
    with pytest.raises(UserError, match=f"{max(LENGTHS)} tokens"):
        split_micro_batches(ROLLOUTS, 50)


def test_the_buffer_survives_a_checkpoint() -> None:
    buffer = RolloutBuffer(max_staleness=2)
    buffer.add([make(5, 1, 3), make(6, 1, 3), make(7, 2, 4)])
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    restored = RolloutBuffer(max_staleness=2)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert len(restored) == 3 and restored.num_groups == 2
    for ours, theirs in zip(restored.take(9, 4), buffer.take(9, 4), strict=True):
        assert torch.equal(ours.routed_experts, theirs.routed_experts)
        ours.routed_experts = theirs.routed_experts = None
        assert ours == theirs


def test_stale_groups_are_dropped_and_counted() -> None:
    buffer = RolloutBuffer(max_staleness=1)
    buffer.add([make(5, 1, 1), make(5, 1, 1), make(5, 2, 2), make(5, 3, 3)])
    assert [rollout.group_id for rollout in buffer.take(1, policy_version=3)] == [2]
    assert buffer.dropped_stale == 2 and len(buffer) == 1
    with pytest.raises(ValueError, match="already"):
        buffer.add([make(5, 3, 3)])


def test_a_full_buffer_drops_its_oldest_groups() -> None:
    buffer = RolloutBuffer(capacity=2)
    buffer.add([make(5, 1), make(5, 2), make(5, 3)])
    assert [rollout.group_id for rollout in buffer.take(9, 0)] == [2, 3] and buffer.dropped_full == 1
