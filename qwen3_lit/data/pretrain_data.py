"""Pre-training rows from prepared corpora (phases 1 to 3).

Contract: row r of the training stream is a pure function of (settings, r), built from slots of ``sequence_length``
tokens as ``mixture`` describes: whole documents packed best-fit without padding, each closed by <|endoftext|>. A
document longer than ``sequence_length`` is read in consecutive pieces of that length, and the few that are cut to fill
a slot go on in another slot; a piece is a document of its own for attention and positions (the usual practice with
document masking). The last token of a cut piece still has its true target, the document's next token, so no prediction
of the corpus is lost.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from qwen3_lit.data.batch import PackedBatch
from qwen3_lit.data.corpus import PreparedCorpus
from qwen3_lit.data.mixture import LengthBucket, Mixture, SourceStream
from qwen3_lit.data.packing import Document, pack_best_fit, pack_row
from qwen3_lit.data.text_data_module import TextDataModule
from qwen3_lit.data.window_packing import Span
from qwen3_lit.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceConfig:
    """One prepared corpus of the mixture."""

    path: str
    """Folder made by ``qwen3-lit data prepare``, local or remote (s3://...)."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources."""
    name: str = ""
    """Name in logs; it also seeds the source's order. Default: the folder's name."""

    @property
    def label(self) -> str:
        return self.name or os.path.basename(self.path.rstrip("/"))


class PretrainData(TextDataModule):
    """Mixture of prepared corpora, packed into rows of exactly ``batch_tokens`` tokens, without end.

    Args:
        tokenizer_path: tokenizer folder; every source must have been prepared with the same vocabulary.
        sources: prepared corpora with weights.
        sequence_length: longest document, in tokens; longer ones are read in pieces of this length.
        batch_tokens: tokens of a row (one micro batch of one rank), a multiple of sequence_length.
        length_mix: shares of tokens by document length; empty takes the documents as they come. Qwen3's third stage is
            75 % from 16,384 to 32,768 and 25 % from 4,096 to 16,384.
        val_tokens: tokens of the held-out rows, over all sources in proportion to their weights; 0 for no validation.
        val_min_tokens: only held-out documents of this length or more.
        seed: decides every order.
        max_documents: most documents and pieces of documents in a row, shared evenly by its sequences; it fixes the
            length of cu_seqlens, which attention kernels pay for. Default: one for 32 tokens, at least 16 a sequence,
            or four times the mean of the sources where that is more.
        prefetch_batches: rows made ahead by a background thread.
        window_slots: sequences packed together; more keeps more documents whole, and costs planning time.
    """

    def __init__(
        self,
        tokenizer_path: str,
        sources: list[SourceConfig],
        sequence_length: int = 4096,
        batch_tokens: int = 16384,
        length_mix: list[LengthBucket] | None = None,
        val_tokens: int = 262144,
        val_min_tokens: int = 0,
        seed: int = 0,
        max_documents: int | None = None,
        prefetch_batches: int = 2,
        window_slots: int = 64,
    ) -> None:
        super().__init__(
            tokenizer_path,
            batch_tokens=batch_tokens,
            seed=seed,
            pad_rows=False,
            max_documents=max_documents,
            prefetch_batches=prefetch_batches,
        )
        if sequence_length < 2 or batch_tokens % sequence_length:
            raise UserError(
                f"data.batch_tokens is {batch_tokens}, data.sequence_length {sequence_length}: expected a multiple "
                "of a length of 2 or more, for rows are made of whole sequences"
            )
        if max_documents is not None and max_documents < batch_tokens // sequence_length:
            raise UserError(
                f"data.max_documents is {max_documents}: expected {batch_tokens // sequence_length} or more, one for "
                f"each sequence of {sequence_length} tokens in a row of {batch_tokens}"
            )
        if window_slots < 1 or val_tokens < 0 or val_min_tokens < 0:
            raise UserError(
                f"data.window_slots {window_slots}, data.val_tokens {val_tokens}, data.val_min_tokens {val_min_tokens}:"
                " expected 1 or more, 0 or more, 0 or more"
            )
        if not sources:
            raise UserError(
                "data.sources is empty; expected one or more {path, weight} made by 'qwen3-lit data prepare'"
            )
        labels = [source.label for source in sources]
        if len(set(labels)) < len(labels):
            raise UserError(f"data.sources: names {labels} are not all different; set name: on the ones that are alike")
        self.sources = sources
        self.sequence_length = sequence_length
        self.length_mix = list(length_mix or [])
        total = sum(bucket.fraction for bucket in self.length_mix)
        if self.length_mix and abs(total - 1.0) > 1e-6:
            raise UserError(f"data.length_mix: the fractions add up to {total:g}, expected 1")
        self.val_tokens = val_tokens
        self.val_min_tokens = val_min_tokens
        self.window_slots = window_slots
        self._given_max_documents = max_documents
        self._mixture = Mixture([source.weight for source in sources], seed)
        self._corpora: list[PreparedCorpus] = []
        self._streams: list[SourceStream] = []
        self._held_out: list[PreparedCorpus] = []
        self._val_rows: list[list[tuple[int, Span]]] = []

    # ---- TextDataModule

    def load_data(self) -> None:
        """Open the corpora. Raises ``UserError`` for a missing one or one prepared with another tokenizer."""
        self._corpora = [PreparedCorpus(source.path) for source in self.sources]
        for corpus in self._corpora:
            corpus.check_tokenizer(self.tokenizer)
        slots, given = self.batch_tokens // self.sequence_length, self._given_max_documents
        self._streams = [
            SourceStream(
                corpus.lengths,
                seed=self.seed,
                name=source.label,
                slot_tokens=self.sequence_length,
                buckets=self.length_mix,
                window_slots=self.window_slots,
                max_pieces=None if given is None else given // slots,
            )
            for source, corpus in zip(self.sources, self._corpora, strict=True)
        ]
        self._held_out = [PreparedCorpus(source.path, "held_out") for source in self.sources]
        if given is None:
            self.max_documents = slots * max(stream.max_pieces for stream in self._streams)
        self._val_rows = self._plan_validation()
        for line in self.describe():
            log.info("%s", line)

    def make_batch(self, index: int) -> PackedBatch:
        """Row ``index`` of the training stream: exactly ``batch_tokens`` tokens."""
        slots = self.batch_tokens // self.sequence_length
        spans: list[tuple[int, Span]] = []
        for source, ordinal in self._mixture(index, 0, 1, slots):
            spans += [(source, span) for span in self._streams[source].slot(ordinal)]
        return self._row(spans, self._corpora, self.batch_tokens, pad=False)

    def make_val_batch(self, index: int) -> PackedBatch:
        """Held-out row ``index``, padded to ``batch_tokens``."""
        return self._row(self._val_rows[index], self._held_out, self.batch_tokens, pad=True)

    def num_val_batches(self) -> int:
        """Held-out rows within ``val_tokens``."""
        return len(self._val_rows)

    def long_val_batches(self, length: int) -> list[PackedBatch]:
        """Held-out rows of exactly ``length`` tokens, each one piece of one document, without padding.

        Each source gives rows for its share of ``val_tokens``, one at least, as far as it has such documents.

        Raises:
            UserError: no source has a held-out document of ``length`` tokens.
        """
        self.ensure_loaded()
        rows: list[PackedBatch] = []
        for source, (corpus, share) in enumerate(zip(self._held_out, self._mixture.shares, strict=True)):
            wanted = max(int(share * self.val_tokens) // length, 1)
            spans = [
                Span(document, start, start + length)
                for document in np.flatnonzero(corpus.lengths >= length)[:wanted].tolist()
                for start in range(0, int(corpus.lengths[document]) - length + 1, length)
            ]
            rows += [self._row([(source, span)], self._held_out, length, pad=False) for span in spans[:wanted]]
        if not rows:
            raise UserError(
                f"data.sources: no held-out document of {length} tokens or more; "
                "prepare with a larger held_out_fraction, or leave model.init_args.extrapolation_chunks null"
            )
        return rows

    def order_settings(self) -> dict[str, Any]:
        """All that decides which row has which index; ``corpora`` are the documents and tokens of each source."""
        self.ensure_loaded_streams()
        infos = [corpus.info for corpus in self._corpora]
        return {
            "seed": self.seed,
            "batch_tokens": self.batch_tokens,
            "sequence_length": self.sequence_length,
            "sources": [[source.label, source.weight] for source in self.sources],
            "length_mix": [list(dataclasses.astuple(bucket)) for bucket in self.length_mix],
            "window_slots": self.window_slots,
            "max_documents": self.max_documents,
            "corpora": [[info.documents["train"], info.tokens["train"]] for info in infos],
        }

    # ---- reports

    def describe(self) -> list[str]:
        """One line a source: documents, tokens and share, and how many tokens of training are one epoch of it."""
        self.ensure_loaded_streams()
        lines = []
        for source, stream, share in zip(self.sources, self._streams, self._mixture.shares, strict=True):
            lines.append(
                f"source {source.label}: {stream.num_documents:,} documents, {stream.epoch_tokens:,} tokens, "
                f"{100 * share:.1f} % of the batch, one epoch every {int(stream.epoch_tokens / share):,} tokens"
            )
        held_out = sum(span.stop - span.start for row in self._val_rows for _, span in row)
        return [*lines, f"held-out: {held_out:,} tokens in {len(self._val_rows)} rows"]

    def ensure_loaded_streams(self) -> None:
        """Load the data unless that is under way or done."""
        if not self._streams:
            self.ensure_loaded()

    def document_lengths(self) -> np.ndarray:
        """Lengths of all training documents, for histograms (uint32)."""
        self.ensure_loaded_streams()
        return np.concatenate([np.asarray(corpus.lengths) for corpus in self._corpora])

    # ---- rows

    def _row(
        self, spans: list[tuple[int, Span]], corpora: list[PreparedCorpus], batch_tokens: int, pad: bool
    ) -> PackedBatch:
        documents: list[Document] = []
        following: list[int | None] = []
        for source, span in spans:
            ids = corpora[source].read(span.document, span.start, span.stop + 1)
            length = span.stop - span.start
            following.append(int(ids[length]) if len(ids) > length else None)
            documents.append(Document(cast(Sequence[int], ids[:length])))
        row = pack_row(
            documents,
            batch_tokens=batch_tokens,
            max_documents=self.max_documents,
            pad_rows=pad,
            pad_token_id=self.tokenizer.end_of_text_id,
        )
        end, added = 0, 0
        for document, token_id in zip(documents, following, strict=True):
            end += len(document)
            if token_id is not None:
                row.target_ids_T[end - 1] = token_id
                added += 1
        return dataclasses.replace(row, loss_tokens=row.num_loss_tokens + added)

    def _plan_validation(self) -> list[list[tuple[int, Span]]]:
        """Held-out documents in stored order until each source's share is reached, packed best-fit into rows."""
        pieces: list[tuple[int, Span]] = []
        for source, (corpus, share) in enumerate(zip(self._held_out, self._mixture.shares, strict=True)):
            quota = int(share * self.val_tokens)
            for document, length in enumerate(corpus.lengths):
                if quota <= 0:
                    break
                if length < self.val_min_tokens:
                    continue
                for start in range(0, min(int(length), quota), self.sequence_length):
                    stop = min(start + self.sequence_length, int(length), start + quota)
                    if stop - start >= 2:
                        pieces.append((source, Span(document, start, stop)))
                    quota -= stop - start
                    if quota <= 0:
                        break
        lengths = [span.stop - span.start for _, span in pieces]
        rows = pack_best_fit(lengths, self.batch_tokens, self.max_documents)
        return [[pieces[piece] for piece in row] for row in rows]
