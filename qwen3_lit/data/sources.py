"""Where raw text comes from: PATH arguments become an ordered list of units, a unit becomes documents.

A unit is the smallest piece that is read on its own: a file, a byte range of a JSONL file, a row group of a parquet
file, a row range of a ``datasets`` set. Listing units looks at names and sizes only, so a plan of a huge corpus is
cheap; reading a unit is a pure function of the unit, so any process can do it, in any order, twice.

PATH forms: a folder, a file, ``*.jsonl[.gz]``, ``*.parquet``, ``hub:NAME[?config=C&split=S]`` (a ``datasets`` name),
``python:stdlib`` (sources and docstrings of the running Python's standard library), ``python:site-packages``
(documentation that the installed packages carry: descriptions, Markdown and rst files, docstrings).
"""

from __future__ import annotations

import fnmatch
import functools
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs

from qwen3_lit.errors import UserError

_RANGE_BYTES = 8 << 20
_HUB_ROWS = 4096
_HUB_ROW_BYTES = 2048
_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages", "venv", "build"})
_STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "ensurepip", "lib2to3", "lib-dynload", "turtledemo"})
_PACKAGES_SKIPPED = frozenset({"test", "tests", "testing", "_vendor", "vendored"})
_OWN = "qwen3_lit-"
"""How this package's own metadata folder begins: its README is in there, and editing it would move the corpus."""
_LICENSE_NAMES = ("license", "licence", "copying", "notice", "authors", "record", "top_level", "entry_points")


class UnreadableDocumentError(Exception):
    """A file that holds no usable text; the message is the reason, one or two words, used as a counter name."""


class UnavailableSourceError(UserError):
    """A source that cannot be read at the moment: the disk, the network or the permissions, not its contents."""


class FileReader(Protocol):
    """What turns one file into documents (``curation.document_text.DocumentReader`` is the one that ships)."""

    def accepts(self, path: Path) -> bool: ...

    def read(self, path: Path, part: str = "text") -> list[str]: ...


@dataclass(frozen=True)
class SourceOptions:
    """What to take from the sources."""

    include: tuple[str, ...] = ()
    """Globs on the path below the given folder; when given, only matching files are read."""
    exclude: tuple[str, ...] = ()
    """Globs on the path below the given folder; matching files are left out."""
    text_field: str = "text"
    """Column of JSONL, parquet and datasets rows that holds the text."""
    on_bad_record: str = "raise"
    """``raise`` stops at a bad row with file, line and field; ``skip`` counts and goes on."""

    def __post_init__(self) -> None:
        if self.on_bad_record not in ("raise", "skip"):
            raise UserError(f"on_bad_record: got {self.on_bad_record!r}, expected raise or skip")


@dataclass(frozen=True)
class Unit:
    """One piece of a source. ``start``/``stop``: byte range (JSONL), row group (parquet), row range (hub)."""

    kind: str
    path: str
    size: int
    part: str = "text"
    start: int = 0
    stop: int = -1
    file_bytes: int = -1
    name: str = ""
    """What the source calls it: the path below the given folder. Orders hang on it, not on where the folder lies."""

    def as_row(self) -> list[Any]:
        return list(astuple(self))


@dataclass(frozen=True)
class Document:
    """One document. ``group`` names what it was cut from: documents of one group share a train/held-out split."""

    text: str
    group: str


def list_units(paths: Sequence[str], reader: FileReader, options: SourceOptions) -> list[Unit]:
    """All units of all paths, sorted inside each path, each file once. Raises ``UserError`` for a path that does not
    exist or holds nothing readable."""
    units: list[Unit] = []
    seen: set[tuple[str, str, int]] = set()
    for path in paths:
        found = list(_list_path(path, reader, options))
        if not found:
            raise UserError(
                f"{path}: no readable text found (looked for text, code, Markdown, JSONL and parquet files"
                f"{'; include ' + ' '.join(options.include) if options.include else ''}); give another path or globs"
            )
        for unit in found:
            key = (unit.kind, unit.path, unit.start)
            if key not in seen:
                seen.add(key)
                units.append(replace(unit, name=_name_below(path, unit.path)))
    return units


def _name_below(source: str, path: str) -> str:
    if source.startswith("hub:"):
        return path
    roots = {"python:stdlib": "stdlib", "python:site-packages": "purelib"}
    root = sysconfig.get_path(roots[source]) if source in roots else os.path.realpath(source)
    return os.path.relpath(path, root if os.path.isdir(root) else os.path.dirname(root))


def _list_path(path: str, reader: FileReader, options: SourceOptions) -> Iterator[Unit]:
    if path == "python:stdlib":
        yield from _list_python(Path(sysconfig.get_path("stdlib")), _STDLIB_SKIPPED, "text+docstrings", reader, options)
    elif path == "python:site-packages":
        for folder in dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
            yield from _list_python(Path(folder), _PACKAGES_SKIPPED, "docstrings", reader, options)
    elif path.startswith("hub:"):
        yield from _list_hub(path)
    elif path.startswith("python:"):
        raise UserError(f"{path}: unknown Python source; expected python:stdlib or python:site-packages")
    elif os.path.isdir(path):
        for file in _walk(Path(path), _SKIPPED_FOLDERS):
            relative = file.relative_to(path).as_posix()
            if _wanted(relative, options) and (options.include or reader.accepts(file) or _is_table(file)):
                yield from _list_file(file)
    elif os.path.isfile(path):
        yield from _list_file(Path(path))
    else:
        raise UserError(
            f"{path}: no such file or folder; expected a folder, a file, hub:NAME, python:stdlib or "
            "python:site-packages"
        )


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            f for f in folders if f not in skipped and not f.startswith(".") and not f.endswith(".egg-info")
        )
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name)


def _wanted(relative: str, options: SourceOptions) -> bool:
    def matches(globs: tuple[str, ...]) -> bool:
        name = relative.rsplit("/", 1)[-1]
        return any(fnmatch.fnmatchcase(relative, glob) or fnmatch.fnmatchcase(name, glob) for glob in globs)

    return (not options.include or matches(options.include)) and not matches(options.exclude)


def _is_table(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))


def _list_file(path: Path) -> Iterator[Unit]:
    size = path.stat().st_size
    name = str(path.resolve())
    if size == 0:
        return
    if path.name.endswith(".jsonl"):
        for start in range(0, size, _RANGE_BYTES):
            stop = min(start + _RANGE_BYTES, size)
            yield Unit("jsonl", name, stop - start, start=start, stop=stop, file_bytes=size)
    elif path.name.endswith(".jsonl.gz"):
        yield Unit("jsonl.gz", name, 4 * size, file_bytes=size)
    elif path.suffix == ".parquet":
        yield from _list_parquet(path, name, size)
    else:
        yield Unit("file", name, size, file_bytes=size)


def _list_parquet(path: Path, name: str, size: int) -> Iterator[Unit]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path}: not a parquet file ({str(error).splitlines()[0]}); expected a whole parquet file"
        ) from None
    for group in range(metadata.num_row_groups):
        yield Unit(
            "parquet", name, metadata.row_group(group).total_byte_size, start=group, stop=group + 1, file_bytes=size
        )


def _list_python(
    root: Path, skipped: frozenset[str], part: str, reader: FileReader, options: SourceOptions
) -> Iterator[Unit]:
    for file in _walk(root, skipped | {"__pycache__", "site-packages", "dist-packages"}):
        relative = file.relative_to(root).as_posix()
        if relative.startswith(_OWN) or not _wanted(relative, options) or not reader.accepts(file):
            continue
        is_module = file.suffix == ".py"
        is_documentation = file.suffix.lower() in {".md", ".rst", ".txt"} or file.name == "METADATA"
        if file.stem.lower().startswith(_LICENSE_NAMES) or not (is_module or is_documentation):
            continue
        size = file.stat().st_size
        if size:
            yield Unit("file", str(file), size, part=part if is_module else "text", file_bytes=size)


def _list_hub(path: str) -> Iterator[Unit]:
    rows = len(_load_hub(path))
    for start in range(0, rows, _HUB_ROWS):
        stop = min(start + _HUB_ROWS, rows)
        yield Unit("hub", path, (stop - start) * _HUB_ROW_BYTES, start=start, stop=stop)


@functools.lru_cache(maxsize=4)  # a unit is 4,096 rows; opening the set takes seconds and asks the hub each time
def _load_hub(path: str) -> Any:
    import datasets

    name, _, query = path.removeprefix("hub:").partition("?")
    fields = parse_qs(query)
    if unknown := set(fields) - {"config", "split"}:
        raise UserError(f"{path}: unknown option {sorted(unknown)[0]!r}; expected hub:NAME?config=CONFIG&split=SPLIT")
    config = fields.get("config", [None])[0]
    split = fields.get("split", ["train"])[0]
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnavailableSourceError(
            f"{path}: datasets cannot load it: {reason}; check the name, config, split and the network"
        ) from None


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
        rows = _load_hub(unit.path)
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
