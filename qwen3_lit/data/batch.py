"""What flows from data to the model: flat, packed rows without a batch dimension.

Legend: T tokens of the row (documents end to end, then optional tail padding).

A row holds whole documents. ``cu_seqlens`` marks where each one starts and ends; its length is fixed by the packer and
the unused entries repeat T (documents of length zero), so compiled code never sees another shape. Tail padding, where
there is any, is one more document of its own whose tokens are False in ``token_mask_T``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target id of a position that takes no loss."""


def _move(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class PackedBatch:
    """One row of T tokens.

    ``target_ids_T[t]`` is the token after token t inside the same document, so the model's output at t is compared with
    it as it stands; the last token of each document has no target.
    """

    token_ids_T: Tensor
    """int64 [T]."""
    target_ids_T: Tensor
    """int64 [T], already shifted inside each document; -100 takes no loss."""
    position_ids_T: Tensor
    """int64 [T], restarts at 0 in each document."""
    cu_seqlens: Tensor
    """int32 [fixed], document boundaries: starts with 0, rises to T, padded with T."""
    max_seqlen: int
    """Tokens of the longest document (the tail padding counts as one)."""
    loss_weights_T: Tensor | None = None
    """float32 [T], factor of each position's loss; None means 1 everywhere."""
    token_mask_T: Tensor | None = None
    """bool [T], False on tail padding; None means that there is no padding."""
    document_bounds: tuple[int, ...] | None = None
    """``cu_seqlens`` without padding, on the host since the row was packed: asking the device would wait for it."""
    loss_tokens: int | None = None
    """Targets that are not -100, counted when the row was packed."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the row without tail padding."""
        if self.document_bounds is not None:
            return self.document_bounds[-1]
        if self.token_mask_T is None:
            return self.token_ids_T.numel()
        return int(self.token_mask_T.sum())

    @property
    def num_loss_tokens(self) -> int:
        """Positions with a target."""
        if self.loss_tokens is not None:
            return self.loss_tokens
        return int((self.target_ids_T != IGNORE_INDEX).sum())

    @property
    def num_documents(self) -> int:
        """Documents of the row, tail padding not counted."""
        return len(self.document_spans())

    def document_spans(self) -> list[tuple[int, int]]:
        """[start, end) of each document in order, tail padding left out."""
        bounds = self.document_bounds or self.cu_seqlens.tolist()
        end_of_documents = self.num_tokens
        return [(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True) if a < b <= end_of_documents]

    def without_loss(self) -> Self:
        """The same tokens with no targets: a filler for ranks that have run out of validation rows."""
        return dataclasses.replace(self, target_ids_T=torch.full_like(self.target_ids_T, IGNORE_INDEX), loss_tokens=0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same row on ``device``."""
        moved: dict[str, Any] = {
            f.name: _move(getattr(self, f.name), device, non_blocking) for f in dataclasses.fields(self)
        }
        return type(self)(**moved)

    def pin_memory(self) -> Self:
        """The same row in page-locked host memory."""
        pinned: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            pinned[f.name] = value.pin_memory() if isinstance(value, Tensor) else value
        return type(self)(**pinned)


@dataclass(frozen=True)
class PromptBatch:
    """The problems of one step of reinforcement learning or on-policy distillation."""

    problems: list[dict[str, Any]]
    """Problem records as validated by ``qwen3_lit.data.schema``."""
    indices: list[int] = field(default_factory=list)
    """Row of each problem in the training (or held-out) set."""
    batch_index: int = 0
    """Global index of this batch; ``PromptData.refill`` takes it to draw spare problems."""

    def __len__(self) -> int:
        return len(self.problems)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Nothing to move: text stays on the host."""
        return self


@dataclass(frozen=True)
class PreferenceBatch:
    """Preference pairs packed into one row. P pairs; both answers of a pair share the row."""

    packed: PackedBatch
    chosen_end_P: Tensor
    """int64 [P], position of the last token of each chosen document."""
    rejected_end_P: Tensor
    """int64 [P], position of the last token of each rejected document."""

    @property
    def num_pairs(self) -> int:
        """Pairs of the row."""
        return self.chosen_end_P.numel()

    @property
    def num_tokens(self) -> int:
        """Tokens of the row without tail padding."""
        return self.packed.num_tokens

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same pairs on ``device``."""
        return type(self)(
            self.packed.to(device, non_blocking),
            self.chosen_end_P.to(device, non_blocking=non_blocking),
            self.rejected_end_P.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Self:
        """The same pairs in page-locked host memory."""
        return type(self)(self.packed.pin_memory(), self.chosen_end_P.pin_memory(), self.rejected_end_P.pin_memory())

    def without_loss(self) -> Self:
        """No pairs, the same tokens: a filler for ranks that have run out of validation rows."""
        return type(self)(self.packed.without_loss(), self.chosen_end_P[:0], self.rejected_end_P[:0])
