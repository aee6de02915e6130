"""Pairs of a better and a worse answer, packed for a reward model.

Contract: both answers of a pair are documents of the same row, chosen first, each with its own copy of the prompt. A
reward is read at the last token of a document, so ``PreferenceBatch`` carries those positions.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from qwen3_lit.data.batch import PreferenceBatch
from qwen3_lit.data.chat_template import encode_conversation, with_reference
from qwen3_lit.data.conversation_data import EpochRows, fraction_of
from qwen3_lit.data.packing import Document, pack_in_order, pack_row
from qwen3_lit.data.schema import OnBadRecord, read_located_records
from qwen3_lit.data.text_data_module import TextDataModule
from qwen3_lit.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedPair:
    """The two documents of a preference record."""

    chosen: Document
    rejected: Document

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


class PreferenceData(TextDataModule):
    """Packed preference pairs.

    Args:
        tokenizer_path: tokenizer folder (any Hugging Face one with Qwen3's chat tokens).
        paths: JSONL or parquet files, folders of them, or datasets names, with preference records.
        batch_tokens: most tokens of a row; a pair longer than this is dropped and counted.
        epochs: passes over the data; None goes on until the trainer stops.
        held_out_fraction: share of the pairs kept for validation, chosen by a hash of the prompt.
        on_bad_record: "raise" stops at a bad record, "skip" counts and leaves it out.
        seed: decides every order.
        pad_rows: pad rows to exactly batch_tokens.
        max_documents: most documents (two for each pair) in a row; default batch_tokens / 32, at least 16.
        prefetch_batches: batches made ahead by a background thread.
    """

    def __init__(
        self,
        tokenizer_path: str,
        paths: list[str],
        batch_tokens: int = 16384,
        epochs: int | None = None,
        held_out_fraction: float = 0.0,
        on_bad_record: OnBadRecord = "raise",
        seed: int = 0,
        pad_rows: bool = False,
        max_documents: int | None = None,
        prefetch_batches: int = 2,
    ) -> None:
        super().__init__(tokenizer_path, batch_tokens, seed, pad_rows, max_documents, prefetch_batches)
        if not paths:
            raise UserError("data.paths is empty, expected at least one file of preference pairs")
        if not 0.0 <= held_out_fraction < 1.0:
            raise UserError(f"data.held_out_fraction is {held_out_fraction}, expected 0 or more and less than 1")
        if epochs is not None and epochs < 1:
            raise UserError(f"data.epochs is {epochs}, expected 1 or more, or null for no limit")
        if self.max_documents < 2:
            raise UserError(f"data.max_documents is {self.max_documents}, expected 2 or more: a pair is two documents")
        self.paths = paths
        self.epochs = epochs
        self.held_out_fraction = held_out_fraction
        self.on_bad_record: OnBadRecord = on_bad_record
        self.pairs: list[EncodedPair] = []
        self.held_out_pairs: list[EncodedPair] = []
        self.dropped = 0
        """Pairs left out because they are longer than a row."""
        self._rows: EpochRows | None = None
        self._val_rows: list[list[int]] = []

    def load_data(self) -> None:
        """Read, split and tokenise all pairs.

        Raises:
            UserError: a bad record, or no pair left to train on.
        """
        self.pairs, self.held_out_pairs, self.dropped = [], [], 0
        for path in self.paths:
            for where, record in read_located_records(path, "preference", self.on_bad_record):
                pair = self._encode(record, where)
                held_out = fraction_of(record["messages"], self.seed) < self.held_out_fraction
                if len(pair) > self.batch_tokens:
                    self.dropped += 1
                else:
                    (self.held_out_pairs if held_out else self.pairs).append(pair)
        if self.dropped:
            log.warning("%d preference pairs dropped for being longer than %d tokens", self.dropped, self.batch_tokens)
        if not self.pairs:
            raise UserError(
                f"{', '.join(map(str, self.paths))}: no pair is left to train on ({self.dropped} are longer than "
                f"batch_tokens {self.batch_tokens}, {len(self.held_out_pairs)} held out)"
            )
        most_pairs = self.max_documents // 2
        self._rows = EpochRows([len(p) for p in self.pairs], self.batch_tokens, self.seed, most_pairs)
        self._val_rows = pack_in_order([len(p) for p in self.held_out_pairs], self.batch_tokens, most_pairs)

    def make_batch(self, index: int) -> PreferenceBatch:
        """Row ``index`` of the stream of epochs."""
        self.ensure_loaded()
        assert self._rows is not None
        return self._pack([self.pairs[i] for i in self._rows.row(index)])

    def num_train_batches(self) -> int | None:
        """Rows of all epochs."""
        assert self._rows is not None
        return None if self.epochs is None else self._rows.end_of_epoch(self.epochs - 1)

    def make_val_batch(self, index: int) -> PreferenceBatch:
        """Row ``index`` of the held-out pairs in file order."""
        return self._pack([self.held_out_pairs[i] for i in self._val_rows[index]])

    def num_val_batches(self) -> int:
        """Rows of the held-out pairs."""
        return len(self._val_rows)

    def order_settings(self) -> dict[str, Any]:
        """Seed, row size, and how many pairs there are."""
        return super().order_settings() | {"pairs": len(self.pairs)}

    def _encode(self, record: dict[str, Any], where: str) -> EncodedPair:
        prompt = record["messages"]
        if record.get("reference"):
            prompt = with_reference(prompt, record["reference"])
        documents = []
        for field in ("chosen", "rejected"):
            messages = [*prompt, {"role": "assistant", "content": record[field]}]
            try:
                sample = encode_conversation(self.tokenizer, messages, tools=record.get("tools"))
            except UserError as error:
                raise UserError(f"{where}: field '{field}': {error}") from error
            documents.append(Document(sample.token_ids, sample.loss_mask))
        return EncodedPair(*documents)

    def _pack(self, pairs: list[EncodedPair]) -> PreferenceBatch:
        packed = pack_row(
            [document for pair in pairs for document in (pair.chosen, pair.rejected)],
            batch_tokens=self.batch_tokens,
            max_documents=self.max_documents,
            pad_rows=self.pad_rows,
            pad_token_id=self.tokenizer.end_of_text_id,
        )
        ends = packed.cu_seqlens[1 : 2 * len(pairs) + 1].to(torch.int64) - 1
        return PreferenceBatch(packed, chosen_end_P=ends[0::2].clone(), rejected_end_P=ends[1::2].clone())
