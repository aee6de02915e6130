"""A unit of raw text becomes documents, and units become shards.

Reading a unit is a pure function of the unit, so any process can do it, in any order, twice.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qwen3_lit.data.source_units import FileReader, SourceOptions, UnavailableSourceError, Unit, list_units, load_hub
from qwen3_lit.errors import UserError


class UnreadableDocumentError(Exception):
    """A file that holds no usable text; the message is the reason, one or two words, used as a counter name."""


@dataclass(frozen=True)
class Document:
    """One document. ``group`` names what it was cut from: documents of one group share a train/held-out split."""

    text: str
    group: str


def read_unit(unit: Unit, reader: FileReader, options: SourceOptions, skipped: Counter[str]) -> Iterator[Document]:
    """The documents of one unit, in file order. ``skipped`` counts, by reason, files and rows that hold no usable text.

    Raises ``UnavailableSourceError`` for a source that cannot be read, ``UserError`` for a bad row (unless
    ``on_bad_record`` is ``skip``) and for a file that is damaged or changed since it was listed.
    """
    try:
        yield from _read_documents(unit, reader, options, skipped)
    except OSError as error:
        raise UnavailableSourceError(
            f"{unit.path}: cannot be read ({error.strerror or error}); see to it and run the same command again "
            "(finished shards are kept), or --exclude it with another --out"
        ) from error


def _read_documents(
    unit: Unit, reader: FileReader, options: SourceOptions, skipped: Counter[str]
) -> Iterator[Document]:
    if unit.file_bytes >= 0:
        _check_unchanged(unit)
    if unit.kind == "file":
        yield from _read_file(unit, reader, skipped)
        return
    for place, row in _read_rows(unit, options, skipped):
        text = row.get(options.text_field) if isinstance(row, dict) else None
        half = _half_pair(text) if isinstance(text, str) else ""
        if isinstance(text, str) and not half:
            if text.strip():
                yield Document(text, text)
            else:
                skipped["empty"] += 1
        elif options.on_bad_record == "skip":
            skipped["bad_record"] += 1
        else:
            have = f"columns {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
            seen = f"{type(text).__name__} in it" if isinstance(row, dict) and options.text_field in row else have
            raise UserError(
                f"{place()}: field {options.text_field!r}: got {half or seen}, expected a string; fix the row, name "
                "the column with --text-field, or pass --on-bad-record skip"
            )


def _half_pair(text: str) -> str:
    """What to say of a text that is no Unicode, since JSON can name half a surrogate pair; empty for a sound one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a surrogate pair (\\u{ord(text[error.start]):04x})"
    return ""


def _check_unchanged(unit: Unit) -> None:
    size = os.stat(unit.path).st_size
    if size != unit.file_bytes:
        raise UserError(
            f"{unit.path}: {size} bytes now, {unit.file_bytes} when preparing began; "
            "run the command again to start over"
        )


def _read_file(unit: Unit, reader: FileReader, skipped: Counter[str]) -> Iterator[Document]:
    try:
        texts = reader.read(Path(unit.path), unit.part)
    except UnreadableDocumentError as error:
        skipped[str(error)] += 1
        return
    if not texts:
        skipped["empty"] += 1
    for text in texts:
        yield Document(text, texts[0])


def _read_rows(unit: Unit, options: SourceOptions, skipped: Counter[str]) -> Iterator[tuple[Callable[[], str], Any]]:
    """Rows, each with a function that names its place (finding a line's number means reading all before it)."""
    if unit.kind == "parquet":
        for number, row in enumerate(_read_row_group(unit, options.text_field)):
            yield partial("{}: row group {} row {}".format, unit.path, unit.start, number), row
    elif unit.kind == "hub":
        rows = load_hub(unit.path)
        if len(rows) < unit.stop:
            raise UserError(
                f"{unit.path}: {len(rows)} rows, {unit.stop} or more when preparing began; run the command again to "
                "start over"
            )
        for number, row in enumerate(rows.select(range(unit.start, unit.stop)), unit.start):
            yield partial("{}: row {}".format, unit.path, number), row
    else:
        for place, line in _read_lines(unit):
            if not line.strip():
                continue
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                if options.on_bad_record == "raise":
                    raise UserError(f"{place()}: not JSON ({error}); expected one JSON object a line") from None
                skipped["bad_record"] += 1


def _read_row_group(unit: Unit, text_field: str) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(unit.path)
        columns = [text_field] if text_field in file.schema_arrow.names else None
        rows: list[Any] = file.read_row_group(unit.start, columns=columns).to_pylist()
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's; Arrow's own say that the contents are wrong
            raise
        raise UserError(
            f"{unit.path}: row group {unit.start} is damaged ({str(error).splitlines()[0]}); expected a whole parquet "
            "file, give it anew or --exclude it"
        ) from error
    return rows


def _read_lines(unit: Unit) -> Iterator[tuple[Callable[[], str], bytes]]:
    """Lines that START in the unit's byte range."""
    if unit.kind == "jsonl.gz":
        try:
            with gzip.open(unit.path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    yield partial("{}:{}".format, unit.path, number), line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{unit.path}: broken gzip file ({error}); expected a whole .jsonl.gz file") from None
        return
    with open(unit.path, "rb") as file:
        if unit.start:
            # From the byte before: when it ends a line, the line at start is ours; else it belongs to the last range.
            file.seek(unit.start - 1)
            file.readline()
        offset = file.tell()
        while offset < unit.stop:
            line = file.readline()
            if not line:
                return
            yield partial(_line_place, unit.path, offset), line
            offset += len(line)


def _line_place(path: str, offset: int) -> str:
    """``path:line`` of the line that starts at a byte offset."""
    with open(path, "rb") as file:
        number, left = 1, offset
        while left > 0 and (block := file.read(min(left, 1 << 22))):
            number += block.count(b"\n")
            left -= len(block)
    return f"{path}:{number}"


def make_shards(units: Sequence[Unit], seed: int, shard_bytes: int | None = None) -> list[list[Unit]]:
    """Groups units into shards of about ``shard_bytes`` (1 to 64 MB, by corpus size, when not given).

    The order is a hash of (seed, unit's name and start), so that each shard, and each prefix of the shards, is a fair
    sample of the sources; it depends on nothing else, not on the number of workers or on where the sources lie.
    """
    if shard_bytes is None:
        shard_bytes = min(max(sum(unit.size for unit in units) // 64, 1 << 20), 64 << 20)

    def order(unit: Unit) -> bytes:
        return hashlib.blake2b(
            f"{seed} {unit.name} {unit.start}".encode(errors="surrogateescape"), digest_size=8
        ).digest()

    shards: list[list[Unit]] = [[]]
    size = 0
    for unit in sorted(units, key=order):
        if size >= shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit.size
    return shards


def sample_texts(
    paths: Sequence[str], reader: FileReader, options: SourceOptions, *, max_bytes: int, seed: int = 0
) -> Iterator[str]:
    """Texts out of the sources in hashed order until ``max_bytes`` of UTF-8 are reached: a fair, repeatable sample."""
    skipped: Counter[str] = Counter()
    taken = 0
    for shard in make_shards(list_units(paths, reader, options), seed, shard_bytes=1):
        for unit in shard:
            for document in read_unit(unit, reader, options, skipped):
                text = document.text.encode("utf-8", errors="replace")  # docstrings may hold half surrogate pairs
                yield text.decode("utf-8")
                taken += len(text)
                if taken >= max_bytes:
                    return
