"""What raw text there is: PATH arguments become an ordered list of units.

A unit is the smallest piece that is read on its own: a file, a byte range of a JSONL file, a row group of a parquet
file, a row range of a ``datasets`` set. Listing units looks at names and sizes only, so a plan of a huge corpus is
cheap.

PATH forms: a folder, a file, ``*.jsonl[.gz]``, ``*.parquet``, ``hub:NAME[?config=C&split=S]`` (a ``datasets`` name),
``python:stdlib`` (sources and docstrings of the running Python's standard library), ``python:site-packages``
(documentation that the installed packages carry: descriptions, Markdown and rst files, docstrings).
"""

from __future__ import annotations

import fnmatch
import functools
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
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
    rows = len(load_hub(path))
    for start in range(0, rows, _HUB_ROWS):
        stop = min(start + _HUB_ROWS, rows)
        yield Unit("hub", path, (stop - start) * _HUB_ROW_BYTES, start=start, stop=stop)


@functools.lru_cache(maxsize=4)  # a unit is 4,096 rows; opening the set takes seconds and asks the hub each time
def load_hub(path: str) -> Any:
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
