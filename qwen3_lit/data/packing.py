"""Which documents share a row, and the row they make.

Legend: T tokens of a row.

Two planners map document lengths to rows (lists of document indices): ``pack_in_order`` keeps the order, and
``pack_best_fit`` is best-fit-decreasing (Johnson 1973), which leaves less padding. ``plan_epoch`` is the deterministic
order of one epoch. ``pack_row`` builds the ``PackedBatch``. Overlong documents never vanish in silence: they go through
``LengthLimit``, which drops or cuts by an explicit choice and counts both.
"""

from __future__ import annotations

import bisect
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qwen3_lit.data.batch import IGNORE_INDEX, PackedBatch
from qwen3_lit.errors import UserError

log = logging.getLogger(__name__)

Overlong = Literal["drop", "truncate"]


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that attend to each other and to nothing else."""

    token_ids: Sequence[int]
    loss_mask: Sequence[bool] | None = None
    """True where the token itself is to be predicted; None means every token but the first."""
    weight: float | Sequence[float] = 1.0
    """Factor of the loss: one for the document or one for each token (of the token that is predicted)."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are predicted; the first token of a document never is."""
        return sum(map(bool, self.loss_mask[1:])) if self.loss_mask is not None else max(len(self) - 1, 0)


def seeded_random(seed: int, *keys: int | str) -> random.Random:
    """A generator that depends on nothing but its arguments: the same on every rank, machine and Python version."""
    return random.Random(":".join(str(k) for k in (seed, *keys)))


def default_max_documents(batch_tokens: int) -> int:
    """Documents allowed in a row when nobody says otherwise: one for 32 tokens, at least 16."""
    return max(16, batch_tokens // 32)


class LengthLimit:
    """Holds documents to ``max_tokens`` and counts what that costs.

    Args:
        max_tokens: longest document that is left alone.
        overlong: "drop" leaves longer ones out, "truncate" cuts their tail.
    """

    def __init__(self, max_tokens: int, overlong: Overlong = "drop") -> None:
        if max_tokens < 2:
            raise UserError(
                f"max_tokens is {max_tokens}, but a document needs 2 tokens or more to give a loss: raise it"
            )
        if overlong not in ("drop", "truncate"):
            raise UserError(f"overlong is {overlong!r}, expected 'drop' or 'truncate'")
        self.max_tokens = max_tokens
        self.overlong = overlong
        self.seen = 0
        self.dropped = 0
        self.truncated = 0
        self.without_loss = 0
        self.tokens_cut = 0

    def apply(self, document: Document) -> Document | None:
        """The document, its first ``max_tokens`` tokens, or None when it is left out."""
        self.seen += 1
        excess = len(document) - self.max_tokens
        if excess > 0:
            if self.overlong == "drop":
                self.dropped += 1
                self.tokens_cut += len(document)
                return None
            self.truncated += 1
            self.tokens_cut += excess
            n = self.max_tokens
            document = Document(
                document.token_ids[:n],
                None if document.loss_mask is None else document.loss_mask[:n],
                document.weight if isinstance(document.weight, int | float) else document.weight[:n],
            )
        if document.num_loss_tokens == 0:
            self.without_loss += 1
            return None
        return document

    def counts(self) -> dict[str, int]:
        """How many documents were seen, dropped, truncated and left without a trained token, and the tokens lost."""
        return {
            "seen": self.seen,
            "dropped": self.dropped,
            "truncated": self.truncated,
            "without_loss": self.without_loss,
            "tokens_cut": self.tokens_cut,
        }

    def report(self, what: str) -> None:
        """Log one line when anything was lost."""
        if self.dropped or self.truncated or self.without_loss:
            log.warning(
                "%s: of %d samples %d dropped and %d truncated for being longer than %d tokens, %d dropped for having "
                "no trained token (%d tokens lost)",
                *(what, self.seen, self.dropped, self.truncated, self.max_tokens, self.without_loss, self.tokens_cut),
            )


def _check_lengths(lengths: Sequence[int], capacity: int) -> None:
    longest = max(lengths, default=0)
    if longest > capacity:
        raise UserError(
            f"a document of {longest} tokens does not fit a row of {capacity} tokens: raise batch_tokens or limit the "
            "document length"
        )


def pack_in_order(lengths: Sequence[int], capacity: int, max_documents: int | None = None) -> list[list[int]]:
    """Rows that keep the order of the documents: a row is closed when the next document does not fit.

    Raises:
        UserError: a document is longer than ``capacity``.
    """
    _check_lengths(lengths, capacity)
    rows: list[list[int]] = []
    free = 0
    for index, length in enumerate(lengths):
        if not rows or length > free or (max_documents is not None and len(rows[-1]) >= max_documents):
            rows.append([])
            free = capacity
        rows[-1].append(index)
        free -= length
    return rows


def pack_best_fit(lengths: Sequence[int], capacity: int, max_documents: int | None = None) -> list[list[int]]:
    """Best-fit-decreasing: longest document first, each into the open row that it fills best. Deterministic.

    Raises:
        UserError: a document is longer than ``capacity``.
    """
    _check_lengths(lengths, capacity)
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        at = bisect.bisect_left(open_rows, (length, -1))
        if at < len(open_rows):
            free, row = open_rows.pop(at)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > length and (max_documents is None or len(rows[row]) < max_documents):
            bisect.insort(open_rows, (free - length, row))
    return rows


def plan_epoch(
    lengths: Sequence[int],
    capacity: int,
    *,
    seed: int,
    epoch: int,
    max_documents: int | None = None,
    window: int = 4096,
) -> list[list[int]]:
    """Rows of one epoch: shuffle the documents, pack each window of them best-fit, shuffle the rows.

    A pure function of its arguments. Every document occurs once. The window keeps the cost of packing linear.

    Returns:
        list of rows, each a list of document indices.
    """
    rng = seeded_random(seed, "epoch", epoch)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        chunk = order[start : start + window]
        packed = pack_best_fit([lengths[i] for i in chunk], capacity, max_documents)
        rows.extend([chunk[i] for i in row] for row in packed)
    rng.shuffle(rows)
    return rows


def pack_row(
    documents: Sequence[Document],
    *,
    batch_tokens: int | None = None,
    max_documents: int | None = None,
    pad_rows: bool = False,
    pad_token_id: int = 0,
) -> PackedBatch:
    """Documents end to end, in the order given.

    Args:
        documents: at least one; empty ones are refused.
        batch_tokens: limit of the row, and its exact length with ``pad_rows``.
        max_documents: fixes the length of ``cu_seqlens`` at ``max_documents + 2`` (0, the ends, one tail); None takes
            ``default_max_documents(batch_tokens)``, or the documents at hand where no ``batch_tokens`` is given either.
        pad_rows: pad to ``batch_tokens``; ``token_mask_T`` is False on the tail.
        pad_token_id: token of the tail.

    Raises:
        UserError: no document, an empty one, too many documents, or more tokens than ``batch_tokens``.
    """
    if not documents or any(len(d) == 0 for d in documents):
        raise UserError(f"cannot pack {len(documents)} documents: a row needs at least one and none may be empty")
    if pad_rows and batch_tokens is None:
        raise UserError("pad_rows needs batch_tokens: the length to pad to")
    if max_documents is None:
        max_documents = len(documents) if batch_tokens is None else default_max_documents(batch_tokens)
    used = sum(len(d) for d in documents)
    if len(documents) > max_documents:
        raise UserError(f"{len(documents)} documents in one row, but max_documents is {max_documents}: raise it")
    if batch_tokens is not None and used > batch_tokens:
        raise UserError(
            f"{used} tokens in one row, but batch_tokens is {batch_tokens}: raise it or pack fewer documents"
        )
    total = batch_tokens if pad_rows and batch_tokens is not None else used

    token_ids = torch.full((total,), pad_token_id, dtype=torch.int64)
    target_ids = torch.full((total,), IGNORE_INDEX, dtype=torch.int64)
    position_ids = torch.zeros(total, dtype=torch.int64)
    weighted = any(not isinstance(d.weight, int | float) or d.weight != 1.0 for d in documents)
    weights = torch.ones(total, dtype=torch.float32) if weighted else None
    bounds = [0]
    for document in documents:
        start, end = bounds[-1], bounds[-1] + len(document)
        ids = torch.as_tensor(document.token_ids, dtype=torch.int64)
        token_ids[start:end] = ids
        position_ids[start:end] = torch.arange(end - start)
        targets = ids[1:].clone()
        if document.loss_mask is not None:
            if len(document.loss_mask) != len(document):
                raise UserError(f"loss mask of {len(document.loss_mask)} entries for {len(document)} tokens")
            targets[~torch.as_tensor(document.loss_mask, dtype=torch.bool)[1:]] = IGNORE_INDEX
        target_ids[start : end - 1] = targets
        if weights is not None:
            if isinstance(document.weight, int | float):
                weights[start:end] = document.weight
            else:
                weights[start : end - 1] = torch.as_tensor(document.weight, dtype=torch.float32)[1:]
        bounds.append(end)
    if total > used:
        position_ids[used:] = torch.arange(total - used)
    cu_seqlens = torch.full((max_documents + 2,), total, dtype=torch.int32)
    cu_seqlens[: len(bounds)] = torch.tensor(bounds, dtype=torch.int32)
    return PackedBatch(
        token_ids_T=token_ids,
        target_ids_T=target_ids,
        position_ids_T=position_ids,
        cu_seqlens=cu_seqlens,
        max_seqlen=max(max(len(d) for d in documents), total - used),
        loss_weights_T=weights,
        token_mask_T=torch.arange(total) < used if pad_rows else None,
        document_bounds=tuple(bounds),
        loss_tokens=int((target_ids != IGNORE_INDEX).sum()),
    )
