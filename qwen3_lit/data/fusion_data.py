"""Dialogs for thinking-mode fusion: one model that answers with or without thinking, as the last flag asks.

Source: Qwen3 Technical Report, section 4.3. ``/think`` and ``/no_think`` stand in user turns or in the system message;
some thinking samples carry no flag, because thinking is the default; in dialogs of several turns flags are inserted at
random and the answer obeys the last one seen; the answer without thinking keeps an empty think block in its target.

Contract: the dialog built for a record is a pure function of the seed, the record and the set of the others, not of
their order. Every record is the trained end of exactly one dialog, its answer with the tool calls that led to it;
earlier turns of a dialog are drawn from the other records of its side, training or held out, or are the record's own.
The shares of flags are our own choice: none is published.
"""

import bisect
import logging
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwen3_lit.data.chat_template import answer_turns, is_query, requested_mode, split_thinking
from qwen3_lit.data.conversation_data import ConversationData, LocatedConversation, fraction_of, read_all
from qwen3_lit.data.packing import Overlong, seeded_random
from qwen3_lit.data.schema import OnBadRecord
from qwen3_lit.errors import UserError

log = logging.getLogger(__name__)

FLAGS = {"think": "/think", "no_think": "/no_think"}


def add_flag(content: str, mode: str) -> str:
    """The text with the flag of ``mode`` after it."""
    return f"{content} {FLAGS[mode]}" if content else FLAGS[mode]


def _key_of(keyed: tuple[float, Any]) -> float:
    return keyed[0]


def has_reasoning(message: Mapping[str, Any]) -> bool:
    """Whether an assistant turn holds thinking that is not empty."""
    if isinstance(message.get("reasoning_content"), str):
        return bool(message["reasoning_content"].strip())
    return bool((split_thinking(message.get("content") or "")[0] or "").strip())


class FusionData(ConversationData):
    """Packed dialogs of both modes with mode flags.

    Args:
        tokenizer_path: tokenizer folder (any Hugging Face one with Qwen3's chat tokens).
        thinking_paths: conversations whose last answer has reasoning (reasoning_content or an inline think block), in
            the turns that call tools too.
        non_thinking_paths: conversations whose last answer has none.
        system_flag_fraction: share of the dialogs whose flag stands in the system message instead of a user turn.
        unflagged_fraction: share of the thinking dialogs without any flag.
        multi_turn_fraction: share of the one-question records that get earlier turns from other records.
        max_extra_turns: most earlier turns that such a dialog gets.
        batch_tokens: most tokens of a row, which is one micro batch of one rank.
        max_sample_tokens: longest sample; None is batch_tokens.
        overlong: what happens to longer samples: "drop" or "truncate"; both are counted and logged.
        epochs: passes over the data; None goes on until the trainer stops.
        held_out_fraction: share of the questions kept for validation, with all their answers.
        on_bad_record: "raise" stops at a bad record, "skip" counts and leaves it out.
        seed: decides the flags, the dialogs and every order.
        pad_rows: pad rows to exactly batch_tokens.
        max_documents: most samples in a row; default batch_tokens / 32, at least 16.
        prefetch_batches: batches made ahead by a background thread.
    """

    def __init__(
        self,
        tokenizer_path: str,
        thinking_paths: list[str],
        non_thinking_paths: list[str],
        system_flag_fraction: float = 0.2,
        unflagged_fraction: float = 0.3,
        multi_turn_fraction: float = 0.3,
        max_extra_turns: int = 3,
        batch_tokens: int = 16384,
        max_sample_tokens: int | None = None,
        overlong: Overlong = "drop",
        epochs: int | None = None,
        held_out_fraction: float = 0.0,
        on_bad_record: OnBadRecord = "raise",
        seed: int = 0,
        pad_rows: bool = False,
        max_documents: int | None = None,
        prefetch_batches: int = 2,
    ) -> None:
        super().__init__(
            tokenizer_path=tokenizer_path,
            paths=[*thinking_paths, *non_thinking_paths],
            batch_tokens=batch_tokens,
            max_sample_tokens=max_sample_tokens,
            overlong=overlong,
            turns="answer",
            epochs=epochs,
            held_out_fraction=held_out_fraction,
            on_bad_record=on_bad_record,
            seed=seed,
            pad_rows=pad_rows,
            max_documents=max_documents,
            prefetch_batches=prefetch_batches,
        )
        for name, value in (
            ("system_flag_fraction", system_flag_fraction),
            ("unflagged_fraction", unflagged_fraction),
            ("multi_turn_fraction", multi_turn_fraction),
        ):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"data.{name} is {value}, expected a share between 0 and 1")
        if max_extra_turns < 1:
            raise UserError(f"data.max_extra_turns is {max_extra_turns}, expected 1 or more")
        if not thinking_paths or not non_thinking_paths:
            raise UserError(
                "data.thinking_paths and data.non_thinking_paths both need a file: fusion trains both modes"
            )
        self.thinking_paths = thinking_paths
        self.non_thinking_paths = non_thinking_paths
        self.system_flag_fraction = system_flag_fraction
        self.unflagged_fraction = unflagged_fraction
        self.multi_turn_fraction = multi_turn_fraction
        self.max_extra_turns = max_extra_turns

    def conversations(self) -> list[LocatedConversation]:
        """One flagged dialog for each record, thinking records first.

        Raises:
            UserError: a thinking record without reasoning, a non-thinking one with it, or a flag already there.
        """
        records = [
            *self._read_mode(self.thinking_paths, "think"),
            *self._read_mode(self.non_thinking_paths, "no_think"),
        ]
        keyed = [(fraction_of(c.record["messages"], self.seed), c) for c in records]
        single = sorted(((key, c) for key, c in keyed if self._is_single_turn(c.record)), key=_key_of)
        sides = {side: [(key, c.record) for key, c in single if c.held_out == side] for side in (False, True)}
        return [replace(c, record=self.build_dialog(c.record, key, sides[c.held_out])) for key, c in keyed]

    def build_dialog(
        self, record: dict[str, Any], key: float, others: list[tuple[float, dict[str, Any]]]
    ) -> dict[str, Any]:
        """The dialog whose last turn is the answer of ``record``.

        Args:
            key: the record's own key among ``others``; with the seed it decides all that is drawn.
            others: key and record of each one-question record that earlier turns may come from, by rising keys.

        Returns:
            a conversation record with ``mode`` set; ``requested_mode`` of its prompt is that mode, or None in a
            thinking dialog without flags.
        """
        rng = seeded_random(self.seed, "fusion", repr(key))
        mode = record["mode"]
        messages = [dict(m) for m in record["messages"]]
        system = [messages.pop(0)] if messages[0]["role"] == "system" else []
        drawn = rng.random(), rng.random(), rng.random()
        if self._is_single_turn(record) and drawn[0] < self.multi_turn_fraction:
            messages = self._earlier_turns(key, others, rng) + messages
        users = [i for i, m in enumerate(messages) if is_query(m)]
        if mode == "think" and drawn[1] < self.unflagged_fraction:
            return record | {"messages": system + messages}
        if not users or drawn[2] < self.system_flag_fraction:
            base = system[0]["content"] if system else ""
            if len(users) <= 1:
                return record | {"messages": [{"role": "system", "content": add_flag(base, mode)}, *messages]}
            # With more turns the system message may say one thing and a later user turn another: the later one wins.
            system = [{"role": "system", "content": add_flag(base, rng.choice(("think", "no_think")))}]
        for position in users[:-1]:
            if rng.random() < 0.5:
                flag = rng.choice(("think", "no_think"))
                messages[position]["content"] = add_flag(messages[position]["content"], flag)
        # The last turn may stay bare when the last flag before it already asks for this mode.
        inherited = requested_mode(system + messages) == mode
        if not (inherited and rng.random() < 0.5):
            messages[users[-1]]["content"] = add_flag(messages[users[-1]]["content"], mode)
        return record | {"messages": system + messages}

    def _earlier_turns(
        self, key: float, others: list[tuple[float, dict[str, Any]]], rng: random.Random
    ) -> list[dict[str, Any]]:
        """Turns of records other than the one with ``key``: those whose keys are the next ones after random numbers, so
        that one more record takes the place of others in few dialogs."""
        turns: list[dict[str, Any]] = []
        if others[0][0] == key == others[-1][0]:
            return turns
        for _ in range(rng.randint(1, self.max_extra_turns)):
            at = bisect.bisect_left(others, rng.random(), key=_key_of)
            while others[at % len(others)][0] == key:
                at += 1
            turns += [dict(m) for m in others[at % len(others)][1]["messages"] if m["role"] != "system"]
        return turns

    @staticmethod
    def _is_single_turn(record: dict[str, Any]) -> bool:
        """One question and one answer, no tools: such turns can stand in any other dialog."""
        roles = [m["role"] for m in record["messages"] if m["role"] != "system"]
        return roles == ["user", "assistant"] and not record.get("tools")

    def _read_mode(self, paths: list[str], mode: str) -> list[LocatedConversation]:
        good: list[LocatedConversation] = []
        bad: list[str] = []
        for conversation in read_all(paths, self.on_bad_record):
            try:
                good.append(self._checked(conversation, mode))
            except UserError as error:
                if self.on_bad_record == "raise":
                    raise
                bad.append(str(error))
        if bad:
            log.warning("%s: skipped %d conversations; the first: %s", ", ".join(map(str, paths)), len(bad), bad[0])
        if not good:
            raise UserError(f"{', '.join(map(str, paths))}: no conversation fits mode {mode}; the first: {bad[0]}")
        return good

    def _checked(self, conversation: LocatedConversation, mode: str) -> LocatedConversation:
        messages = conversation.record["messages"]
        for turn in answer_turns(messages):
            where = f"{conversation.where}: field 'messages[{len(turn) - 1}]'"
            if mode == "think" and not has_reasoning(turn[-1]):
                raise UserError(
                    f"{where}: no reasoning, but the file is among thinking_paths; move it to non_thinking_paths"
                )
            if mode == "no_think" and has_reasoning(turn[-1]):
                raise UserError(
                    f"{where}: has reasoning, but the file is among non_thinking_paths; move it to thinking_paths"
                )
        if requested_mode(messages) is not None:
            raise UserError(
                f"{conversation.where}: field 'messages': has a mode flag already; FusionData writes the flags"
            )
        record = conversation.record
        return replace(conversation, record=record | {"mode": mode}, held_out=self.is_held_out(record))
