"""Dialogs as packed rows: data for supervised fine-tuning and off-policy distillation.

Contract: every conversation becomes one sample for each of its assistant turns, for its last one, or for those of its
last answer (``turns``).
Samples are tokenised once. Each epoch shuffles them by seed and packs them anew (``plan_epoch``), so a batch depends on
the seed and its index alone. Held-out conversations are chosen by a hash of what was asked (``asked_turns``): the
choice does not change when more data are added, and two answers to a question never end up on both sides.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from qwen3_lit.data.batch import PackedBatch
from qwen3_lit.data.chat_template import (
    EncodedSample,
    answer_turns,
    encode_conversation,
    is_query,
    requested_mode,
    split_turns,
)
from qwen3_lit.data.packing import Document, LengthLimit, Overlong, pack_in_order, pack_row, plan_epoch
from qwen3_lit.data.schema import OnBadRecord, read_located_records
from qwen3_lit.data.text_data_module import TextDataModule
from qwen3_lit.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocatedConversation:
    """A valid conversation record and the file and line it came from."""

    where: str
    record: dict[str, Any]
    held_out: bool = False
    """Kept for validation."""


def fraction_of(value: Any, seed: int) -> float:
    """A number in [0, 1) that depends on the value's JSON and the seed alone."""
    text = json.dumps([seed, value], sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def asked_turns(messages: list[dict[str, Any]]) -> list[list[Any]]:
    """Role and content of the system and user turns: alike for all answers to a question, whatever tools returned."""
    return [[m["role"], m.get("content")] for m in messages if m["role"] == "system" or is_query(m)]


def read_all(paths: list[str], on_bad_record: OnBadRecord) -> list[LocatedConversation]:
    """All conversations of some files, in order."""
    if not paths:
        raise UserError("data.paths is empty, expected at least one file of conversations")
    return [
        LocatedConversation(where, record)
        for path in paths
        for where, record in read_located_records(path, "conversation", on_bad_record)
    ]


class EpochRows:
    """Global batch index -> samples that share that row, through epochs of possibly different row counts."""

    def __init__(self, lengths: list[int], capacity: int, seed: int, max_documents: int) -> None:
        self._lengths = lengths
        self._options: dict[str, Any] = {"capacity": capacity, "seed": seed, "max_documents": max_documents}
        self._ends: list[int] = []
        self._lock = threading.Lock()
        # Neighbouring indices share an epoch; the prefetch thread and a caller may be in two of them.
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    def _make_plan(self, epoch: int) -> list[list[int]]:
        return plan_epoch(self._lengths, epoch=epoch, **self._options)

    def end_of_epoch(self, epoch: int) -> int:
        """First index after ``epoch``."""
        with self._lock:
            while len(self._ends) <= epoch:
                self._ends.append((self._ends[-1] if self._ends else 0) + len(self._plan(len(self._ends))))
            return self._ends[epoch]

    def row(self, index: int) -> list[int]:
        """Samples of batch ``index``."""
        epoch = 0
        while self.end_of_epoch(epoch) <= index:
            epoch += 1
        first = self.end_of_epoch(epoch - 1) if epoch else 0
        return self._plan(epoch)[index - first]


class ConversationData(TextDataModule):
    """Packed conversations with loss on the assistant's turns.

    Args:
        tokenizer_path: tokenizer folder (any Hugging Face one with Qwen3's chat tokens).
        paths: JSONL or parquet files, folders of them, or datasets names, with conversation records.
        batch_tokens: most tokens of a row, which is one micro batch of one rank.
        max_sample_tokens: longest sample; None is batch_tokens.
        overlong: what happens to longer samples: "drop" or "truncate"; both are counted and logged.
        turns: "each" trains every assistant turn as its own sample, "last" the last turn of each conversation,
            "answer" every turn after the last user's: the last answer with the tool calls that led to it.
        no_think_prompt: for records with mode no_think: "as_written" trains the empty think block as part of the
            answer; "hard_switch" puts it into the prompt, as enable_thinking=False does.
        epochs: passes over the data; None goes on until the trainer stops.
        held_out_fraction: share of the questions kept for validation, with all their answers.
        on_bad_record: "raise" stops at a bad record, "skip" counts and leaves it out.
        seed: decides every order.
        pad_rows: pad rows to exactly batch_tokens.
        max_documents: most samples in a row; default batch_tokens / 32, at least 16.
        prefetch_batches: batches made ahead by a background thread.
    """

    def __init__(
        self,
        tokenizer_path: str,
        paths: list[str],
        batch_tokens: int = 16384,
        max_sample_tokens: int | None = None,
        overlong: Overlong = "drop",
        turns: Literal["each", "last", "answer"] = "each",
        no_think_prompt: Literal["as_written", "hard_switch"] = "as_written",
        epochs: int | None = None,
        held_out_fraction: float = 0.0,
        on_bad_record: OnBadRecord = "raise",
        seed: int = 0,
        pad_rows: bool = False,
        max_documents: int | None = None,
        prefetch_batches: int = 2,
    ) -> None:
        super().__init__(tokenizer_path, batch_tokens, seed, pad_rows, max_documents, prefetch_batches)
        if not 0.0 <= held_out_fraction < 1.0:
            raise UserError(f"data.held_out_fraction is {held_out_fraction}, expected 0 or more and less than 1")
        if epochs is not None and epochs < 1:
            raise UserError(f"data.epochs is {epochs}, expected 1 or more, or null for no limit")
        if max_sample_tokens is not None and max_sample_tokens > batch_tokens:
            raise UserError(
                f"data.max_sample_tokens is {max_sample_tokens}, but batch_tokens is {batch_tokens}: raise it"
            )
        if turns not in ("each", "last", "answer"):
            raise UserError(f"data.turns is {turns!r}, expected 'each', 'last' or 'answer'")
        self.paths = paths
        self.max_sample_tokens = max_sample_tokens or batch_tokens
        self.overlong: Overlong = overlong
        self.turns = turns
        self.no_think_prompt = no_think_prompt
        self.epochs = epochs
        self.held_out_fraction = held_out_fraction
        self.on_bad_record: OnBadRecord = on_bad_record
        self.samples: list[EncodedSample] = []
        """Training samples in file order."""
        self.held_out_samples: list[EncodedSample] = []
        """Samples of the held-out conversations, in file order."""
        self.length_counts: dict[str, int] = {}
        """Samples seen, dropped and truncated by the length limit."""
        self._rows: EpochRows | None = None
        self._val_rows: list[list[int]] = []

    # ---- reading

    def conversations(self) -> list[LocatedConversation]:
        """The conversations to train on and to hold out, in a fixed order. Subclasses may build them."""
        return [
            replace(conversation, held_out=self.is_held_out(conversation.record))
            for conversation in read_all(self.paths, self.on_bad_record)
        ]

    def is_held_out(self, record: dict[str, Any]) -> bool:
        """The side that a record belongs to, as it was read."""
        return fraction_of(asked_turns(record["messages"]), self.seed) < self.held_out_fraction

    def load_data(self) -> None:
        """Read, split, tokenise and limit all conversations.

        Raises:
            UserError: a bad record, or no sample left to train on.
        """
        self.samples, self.held_out_samples = [], []
        conversations = self.conversations()
        self._warn_of_unmarked_modes(conversations)
        training, held_out = self._split(conversations)
        limit = LengthLimit(self.max_sample_tokens, self.overlong)
        for source, target in ((training, self.samples), (held_out, self.held_out_samples)):
            for conversation in source:
                target.extend(self._limited(self.encode_record(conversation), limit))
        self.length_counts = limit.counts()
        limit.report(type(self).__name__)
        if not self.samples:
            raise UserError(
                f"{', '.join(map(str, self.source_paths()))}: no sample is left to train on ({self.length_counts}); "
                "check max_sample_tokens and held_out_fraction"
            )
        lengths = [len(s) for s in self.samples]
        self._rows = EpochRows(lengths, self.batch_tokens, self.seed, self.max_documents)
        held_out_lengths = [len(s) for s in self.held_out_samples]
        self._val_rows = pack_in_order(held_out_lengths, self.batch_tokens, self.max_documents)
        log.info("%d samples to train on, %d held out", len(self.samples), len(self.held_out_samples))

    def source_paths(self) -> list[str]:
        """Files the data come from, for messages."""
        return self.paths

    def encode_record(self, conversation: LocatedConversation) -> Iterator[EncodedSample]:
        """Samples of one conversation.

        Raises:
            UserError: the conversation cannot be rendered; the message names its file and line.
        """
        record = conversation.record
        mode = record.get("mode")
        thinking = not (mode == "no_think" and self.no_think_prompt == "hard_switch")
        dialogs = answer_turns(record["messages"]) if self.turns == "answer" else split_turns(record["messages"])
        if self.turns == "last":
            dialogs = dialogs[-1:]
        for messages in dialogs:
            try:
                yield encode_conversation(
                    self.tokenizer, messages, tools=record.get("tools"), enable_thinking=thinking, mode=mode
                )
            except UserError as error:
                raise UserError(f"{conversation.where}: {error}") from error

    def _warn_of_unmarked_modes(self, conversations: list[LocatedConversation]) -> None:
        if self.no_think_prompt == "hard_switch":
            return
        modes = {c.record.get("mode") for c in conversations}
        unmarked = [
            conversation
            for conversation in conversations
            if conversation.record.get("mode") == "no_think" and requested_mode(conversation.record["messages"]) is None
        ]
        if unmarked and "think" in modes:
            log.warning(
                "%d answers without thinking, the first %s, have a prompt without a flag, and others think after the "
                "same kind of prompt: which of the two comes is left to chance. FusionData writes flags; "
                "no_think_prompt: hard_switch puts the empty think block into the prompt",
                *(len(unmarked), unmarked[0].where),
            )

    def _split(
        self, conversations: list[LocatedConversation]
    ) -> tuple[list[LocatedConversation], list[LocatedConversation]]:
        held_out = [conversation for conversation in conversations if conversation.held_out]
        training = [conversation for conversation in conversations if not conversation.held_out]
        if self.held_out_fraction > 0.0 and not held_out:
            log.warning(
                "held_out_fraction %g of %d conversations holds none out: there is no validation",
                *(self.held_out_fraction, len(conversations)),
            )
        return training, held_out

    def _limited(self, samples: Iterator[EncodedSample], limit: LengthLimit) -> Iterator[EncodedSample]:
        for sample in samples:
            document = limit.apply(Document(sample.token_ids, sample.loss_mask, sample.weight))
            if document is not None:
                mask = list(document.loss_mask or ())
                yield EncodedSample(list(document.token_ids), mask, mode=sample.mode, weight=sample.weight)

    # ---- batches

    def make_batch(self, index: int) -> PackedBatch:
        """Row ``index`` of the stream of epochs."""
        self.ensure_loaded()
        assert self._rows is not None
        return self._pack([self.samples[i] for i in self._rows.row(index)])

    def num_train_batches(self) -> int | None:
        """Rows of all epochs."""
        assert self._rows is not None
        return None if self.epochs is None else self._rows.end_of_epoch(self.epochs - 1)

    def make_val_batch(self, index: int) -> PackedBatch:
        """Row ``index`` of the held-out samples in file order."""
        return self._pack([self.held_out_samples[i] for i in self._val_rows[index]])

    def num_val_batches(self) -> int:
        """Rows of the held-out samples."""
        return len(self._val_rows)

    def order_settings(self) -> dict[str, Any]:
        """Seed, row size, and how many samples there are."""
        sources = [str(Path(p)) for p in self.source_paths()]
        return super().order_settings() | {"samples": len(self.samples), "paths": sources, "turns": self.turns}

    def _pack(self, samples: list[EncodedSample]) -> PackedBatch:
        return pack_row(
            [Document(s.token_ids, s.loss_mask, s.weight) for s in samples],
            batch_tokens=self.batch_tokens,
            max_documents=self.max_documents,
            pad_rows=self.pad_rows,
            pad_token_id=self.tokenizer.end_of_text_id,
        )
