"""Sums over tokens, sequences and ranks, on which every loss of this package is normalised.

Convention of the package: a loss is a sum over the local tokens divided by a *global* count (all ranks, all
accumulation micro-steps of one optimizer step). Such contributions add up to the loss on the whole batch, so gradients
must be summed over ranks and micro-steps, not averaged. A strategy that averages (DDP) is compensated by passing
``count / (ranks * micro-steps)`` instead, or by scaling the loss.

Legend: T tokens.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

V = TypeVar("V")


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of ``tensor`` over all ranks of ``group``, detached; the tensor itself when nothing is distributed."""
    tensor = tensor.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return total


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Largest value of each element over all ranks, detached; the tensor itself when nothing is distributed."""
    tensor = tensor.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    largest = tensor.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def gather_over_ranks(value: V) -> list[V]:
    """Every rank's ``value`` in the order of ranks, for figures whose names differ between ranks.

    Pickled and waited for: meant for what is shown, some hundred bytes a rollout.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def masked_sum(value_T: Tensor, mask_T: Tensor) -> Tensor:
    """Sum over the tokens where the mask is set; masked values may be NaN or infinite without harm, gradients too."""
    mask_T = mask_T.bool()
    return torch.where(mask_T, value_T, torch.zeros_like(value_T)).sum()


def sequence_sum(value_T: Tensor, mask_T: Tensor, sequence_ids_T: Tensor) -> Tensor:
    """Sum within each sequence, given back at every token of it: [T].

    Sequence ids are integers in [0, T); ids of masked tokens are not read. The buffer has T slots whatever the number
    of sequences is, so that nothing waits for the device.
    """
    mask_T = mask_T.bool()
    ids_T = torch.where(mask_T, sequence_ids_T, torch.zeros_like(sequence_ids_T))
    kept_T = torch.where(mask_T, value_T, torch.zeros_like(value_T))
    sums_T = torch.zeros_like(kept_T).index_add(0, ids_T, kept_T)
    return sums_T[ids_T]


def sequence_mean(value_T: Tensor, mask_T: Tensor, sequence_ids_T: Tensor) -> Tensor:
    """Mean over the trained tokens of each sequence, given back at every token of it: [T]."""
    length_T = sequence_sum(torch.ones_like(value_T), mask_T, sequence_ids_T)
    return sequence_sum(value_T, mask_T, sequence_ids_T) / length_T.clamp(min=1.0)
