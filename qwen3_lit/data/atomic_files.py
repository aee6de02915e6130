"""Files and folders that appear under their names only when they are whole, whatever kills the process."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete."""
    temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not final.exists():
            os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_array(file: Path, array: np.ndarray) -> None:
    """``numpy.save`` through a plain file object, whose errors say that the disk is full."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_bytes(file, buffer.getvalue())


def write_text(file: Path, text: str) -> None:
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, data: bytes) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
