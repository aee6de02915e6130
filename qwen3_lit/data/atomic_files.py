"""Files and folders that appear under their names only when they are whole, whatever kills the process.

They are written beside their place as ``.NAME.PID.tmp``. What a killed process left there is removed by the next writer
of the same name. Errors name the place itself, as the user does.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``final`` when the block ends without an error."""
    temporary = _beside(final)
    try:
        with _naming(final, temporary):
            yield temporary
            os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete; one that is there already stays."""
    temporary = _beside(final)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _naming(final, temporary):
            temporary.mkdir(parents=True)
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
    with new_file(file) as temporary:
        temporary.write_bytes(data)


def _beside(final: Path) -> Path:
    """Where this process writes what becomes ``final``; what dead processes left for the same name is removed."""
    leftover = re.compile(rf"\.{re.escape(final.name)}\.(\d+)\.tmp")
    for path in final.parent.iterdir() if final.parent.is_dir() else ():
        match = leftover.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return final.with_name(f".{final.name}.{os.getpid()}.tmp")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


@contextlib.contextmanager
def _naming(final: Path, temporary: Path) -> Iterator[None]:
    """Errors about the temporary path, and a full disk, which comes without a path, get the name of ``final``."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL or error.filename in (str(temporary), temporary):
            raise OSError(error.errno, error.strerror, str(final)) from error
        raise
