"""The four kinds of records that go in, how they are read, and what is said about a bad one.

| kind | required | optional |
|---|---|---|
| text | text | source |
| conversation | messages | tools, mode |
| problem | messages or prompt, answer, task | metadata, mode, tools, split |
| preference | messages, chosen, rejected | reference, task, tools |

Free columns pass through untouched. Files are JSONL (also gzipped), JSON lists, parquet, folders of these, or the name
of a ``datasets`` set ("owner/name", "owner/name:split", or anything after "datasets:"). A bad record is one line: file,
line, field, what was seen, what was expected.

Arrow gives every object of a column the same keys and writes null for those that it lacks: a tool call would get the
arguments of all other tools. So keys whose value is null are left out of messages and tools that come from parquet or
``datasets``. Arguments with nulls of their own must be stored as JSON text there.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, get_args

from qwen3_lit.data.chat_template import ROLES
from qwen3_lit.errors import UserError

log = logging.getLogger(__name__)

Kind = Literal["text", "conversation", "problem", "preference"]
OnBadRecord = Literal["raise", "skip"]
MODES = ("think", "no_think")
SPLITS = ("train", "held_out")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


class ToolCall(TypedDict):
    """A call by the assistant; the OpenAI form {"type": "function", "function": {...}} is accepted too."""

    name: str
    arguments: dict[str, Any] | str


class ChatMessage(TypedDict):
    """One turn."""

    role: str
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class TextRecord(TypedDict):
    """A document for pre-training."""

    text: str
    source: NotRequired[str]


class ConversationRecord(TypedDict):
    """A dialog to imitate."""

    messages: list[ChatMessage]
    tools: NotRequired[list[dict[str, Any]]]
    mode: NotRequired[str]


class ProblemRecord(TypedDict):
    """A prompt whose answers can be scored."""

    messages: list[ChatMessage]
    answer: str
    task: str
    metadata: NotRequired[dict[str, Any]]
    mode: NotRequired[str]
    tools: NotRequired[list[dict[str, Any]]]
    split: NotRequired[str]


class PreferenceRecord(TypedDict):
    """Two answers, the first of which is better."""

    messages: list[ChatMessage]
    chosen: str
    rejected: str
    reference: NotRequired[str]
    task: NotRequired[str]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fail(where: str, field: str, value: Any, expected: str) -> UserError:
    seen = "missing" if value is None else f"{type(value).__name__} {_shown(value)}"
    return UserError(f"{where}: field '{field}': {seen}, expected {expected}")


def _require_text(record: dict[str, Any], field: str, where: str, may_be_empty: bool = False) -> None:
    value = record.get(field)
    if not isinstance(value, str) or (not may_be_empty and not value.strip()):
        raise _fail(where, field, value, "text" if may_be_empty else "text that is not empty")


def _optional(record: dict[str, Any], field: str, kind: type, what: str, where: str) -> None:
    if record.get(field) is not None and not isinstance(record[field], kind):
        raise _fail(where, field, record[field], what)


def _choice(record: dict[str, Any], field: str, allowed: tuple[str, ...], where: str) -> None:
    if record.get(field) is not None and record[field] not in allowed:
        raise _fail(where, field, record[field], f"one of {', '.join(allowed)}")


def _check_calls(calls: Any, where: str, field: str) -> None:
    if not isinstance(calls, list):
        raise _fail(where, field, calls, "a list of tool calls")
    for i, call in enumerate(calls):
        if not isinstance(call, dict):
            raise _fail(where, f"{field}[{i}]", call, "an object with name and arguments")
        called = call.get("function") or call
        if not isinstance(called, dict) or not isinstance(called.get("name"), str):
            raise _fail(where, f"{field}[{i}].name", called.get("name") if isinstance(called, dict) else called, "text")
        if not isinstance(called.get("arguments"), dict | str):
            raise _fail(where, f"{field}[{i}].arguments", called.get("arguments"), "an object or JSON text")


def _clean_messages(messages: Any, where: str, last_role: tuple[str, ...]) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise _fail(where, "messages", messages, "a list of at least one message")
    cleaned: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        field = f"messages[{i}]"
        if not isinstance(message, dict):
            raise _fail(where, field, message, "an object with role and content")
        # Arrow fills the keys that other rows have with null.
        message = {k: v for k, v in message.items() if v is not None}
        if message.get("role") not in ROLES:
            raise _fail(where, f"{field}.role", message.get("role"), f"one of {', '.join(ROLES)}")
        has_calls = bool(message.get("tool_calls"))
        if has_calls:
            _check_calls(message["tool_calls"], where, f"{field}.tool_calls")
            if message["role"] != "assistant":
                raise _fail(where, f"{field}.tool_calls", message["tool_calls"], "none: only the assistant calls tools")
        if not isinstance(message.get("content"), str) and not (has_calls and "content" not in message):
            raise _fail(where, f"{field}.content", message.get("content"), "text")
        if "reasoning_content" in message and not isinstance(message["reasoning_content"], str):
            raise _fail(where, f"{field}.reasoning_content", message["reasoning_content"], "text")
        cleaned.append(message)
    if cleaned[-1]["role"] not in last_role:
        field = f"messages[{len(cleaned) - 1}].role"
        raise _fail(where, field, cleaned[-1]["role"], f"{' or '.join(last_role)} as the last turn")
    return cleaned


def validate_text(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A text record. Empty text is allowed: preparation counts and drops it."""
    _require_text(record, "text", where, may_be_empty=True)
    _optional(record, "source", str, "text", where)
    return record


def validate_conversation(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A conversation record: ends with an assistant turn."""
    _choice(record, "mode", MODES, where)
    _optional(record, "tools", list, "a list of tool schemas", where)
    return record | {"messages": _clean_messages(record.get("messages"), where, ("assistant",))}


def validate_problem(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A problem record: ``prompt`` becomes one user turn; messages end with a user or tool turn."""
    messages = record.get("messages")
    if messages is None:
        if record.get("prompt") is None:
            raise _fail(where, "messages", None, "a list of messages, or text in field 'prompt'")
        _require_text(record, "prompt", where)
        messages = [{"role": "user", "content": record["prompt"]}]
    _require_text(record, "answer", where, may_be_empty=True)
    _require_text(record, "task", where)
    _choice(record, "mode", MODES, where)
    _choice(record, "split", SPLITS, where)
    _optional(record, "metadata", dict, "an object", where)
    _optional(record, "tools", list, "a list of tool schemas", where)
    return record | {"messages": _clean_messages(messages, where, ("user", "tool"))}


def validate_preference(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A preference record: two different answers to messages that end with a user or tool turn."""
    _require_text(record, "chosen", where)
    _require_text(record, "rejected", where)
    if record["chosen"] == record["rejected"]:
        raise _fail(where, "rejected", record["rejected"], "an answer that differs from 'chosen'")
    _optional(record, "reference", str, "text", where)
    _optional(record, "task", str, "text", where)
    _optional(record, "tools", list, "a list of tool schemas", where)
    return record | {"messages": _clean_messages(record.get("messages"), where, ("user", "tool"))}


_VALIDATE: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "text": validate_text,
    "conversation": validate_conversation,
    "problem": validate_problem,
    "preference": validate_preference,
}


def validate_record(record: Any, kind: Kind, where: str) -> dict[str, Any]:
    """The record with its messages cleaned (null keys dropped).

    Args:
        where: "file:line", put in front of the message.

    Raises:
        UserError: a field is missing or wrong.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: {type(record).__name__} {_shown(record)}, expected an object with named fields")
    return _VALIDATE[kind](record, where)


def _row_of(source: str, row: Any, where: str) -> Any:
    """The row, or the error that its text is no Unicode: JSON can name half a surrogate pair, which cannot be encoded.

    Args:
        source: JSON that the row is a part of; without an escape that can be a half of a pair nothing is searched.
    """
    if "\\ud" in source or "\\uD" in source:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return UserError(f"{where}: {half} is half a surrogate pair, expected whole characters; fix the record")
    return row


def _jsonl_row(raw: bytes, encoding: str, where: str) -> Any:
    """What one line holds, or the ``UserError`` that says why it cannot be told."""
    try:
        text = raw.decode(encoding)
        return _row_of(text, json.loads(text), where)
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); re-encode")
    except json.JSONDecodeError as error:
        return UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); fix the line")
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits, or too many brackets
        return UserError(f"{where}: JSON that cannot be read ({error}); fix the line")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                where = f"{path}:{number}"
                if raw.strip():
                    yield where, _jsonl_row(raw, "utf-8-sig" if number == 1 else "utf-8", where)
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); JSON lines belong in .jsonl") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: {type(rows).__name__} at the top, expected a list of records")
    for number, row in enumerate(rows, start=1):
        where = f"{path}:record {number}"
        yield where, _row_of(text, row, where)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _from_arrow(row: dict[str, Any]) -> dict[str, Any]:
    return row | {field: _without_nulls(row[field]) for field in ("messages", "tools") if field in row}


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", _from_arrow(row)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _datasets_rows(name: str) -> Iterator[tuple[str, Any]]:
    import datasets

    repository, _, split = name.removeprefix("datasets:").partition(":")
    try:
        rows = datasets.load_dataset(repository, split=split or "train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{name}:row {number}", _from_arrow(row)
    except UserError:
        raise
    except Exception as error:  # datasets raises a different class for every way a set can be missing
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: no local file, and the data set cannot be loaded ({reason})") from error


def iter_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(where, raw row) of a file, a folder of files in sorted order, or a ``datasets`` name; nothing is validated.

    A row that cannot be decoded comes as the ``UserError`` that says why, so that the caller may skip it.

    Raises:
        UserError: nothing is there, or a file is unreadable.
    """
    name, local = str(path), Path(path)
    if local.is_dir():
        files = sorted(p for p in local.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        if not files:
            raise UserError(f"{local}: no {', '.join(SUFFIXES)} file in this folder")
        for file in files:
            yield from iter_rows(file)
    elif local.is_file():
        if name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl_rows(local)
        elif name.endswith(".json"):
            yield from _json_rows(local)
        elif name.endswith(".parquet"):
            yield from _parquet_rows(local)
        else:
            raise UserError(f"{local}: unknown kind of file, expected {', '.join(SUFFIXES)}")
    elif name.startswith("datasets:") or (
        re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.+%\[\]-]+)?", name) and not name.endswith(SUFFIXES) and name[0] not in "./"
    ):
        yield from _datasets_rows(name)
    else:
        raise UserError(f"{name}: no such file or folder")


def read_located_records(
    path: str | Path, kind: Kind, on_bad_record: OnBadRecord = "raise"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, valid record) for every record of ``path``; see ``read_records``."""
    if kind not in get_args(Kind):
        raise UserError(f"unknown kind of record {kind!r}, expected one of {', '.join(get_args(Kind))}")
    if on_bad_record not in get_args(OnBadRecord):
        raise UserError(f"on_bad_record is {on_bad_record!r}, expected 'raise' or 'skip'")
    good, bad, first_bad = 0, 0, ""
    for where, row in iter_rows(path):
        try:
            if isinstance(row, UserError):
                raise row
            record = validate_record(row, kind, where)
        except UserError as error:
            if on_bad_record == "raise":
                raise
            bad += 1
            first_bad = first_bad or str(error)
            continue
        good += 1
        yield where, record
    if bad:
        log.warning("%s: skipped %d of %d records; the first: %s", path, bad, good + bad, first_bad)
    if good == 0:
        why = f"all {bad} records are bad, the first: {first_bad}" if bad else "the file is empty"
        raise UserError(f"{path}: no {kind} record ({why})")


def read_records(path: str | Path, kind: Kind, on_bad_record: OnBadRecord = "raise") -> Iterator[dict[str, Any]]:
    """Valid records of a file, a folder or a ``datasets`` name, in order, read as they are consumed.

    Args:
        on_bad_record: "raise" stops at the first bad record, "skip" leaves bad ones out and logs how many.

    Raises:
        UserError: a bad record (with "raise"), an unreadable file, or no valid record at all.
    """
    for _, record in read_located_records(path, kind, on_bad_record):
        yield record
