"""JSON lines files that are either whole or absent."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen3_lit.data.atomic_files import new_file
from qwen3_lit.errors import UserError

Write = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def jsonl_writer(path: str | os.PathLike[str]) -> Iterator[Write]:
    """Give a function that appends one record; the file appears under its name when the block ends without an error.

    Raises:
        UserError: the folder cannot be made, or the file cannot be written (a full disk). Errors of the block about
            other files pass through.
    """
    with _output(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:

        def write(record: Mapping[str, Any]) -> None:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

        yield write
        file.flush()
        os.fsync(file.fileno())


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> int:
    """Stream records to a file and return how many there were."""
    count = 0
    with jsonl_writer(path) as write:
        for record in records:
            write(record)
            count += 1
    return count


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write one indented JSON document, whole or not at all."""
    with _output(Path(path)) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _output(target: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        with new_file(target) as temporary:
            yield temporary
    except OSError as error:
        if error.filename != str(target):
            raise
        raise _cannot_write(target, error) from error


def _cannot_write(target: Path, error: OSError) -> UserError:
    return UserError(f"{target}: cannot be written: {error.strerror or error}; make room or choose another path")
