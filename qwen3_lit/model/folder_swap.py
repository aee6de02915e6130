"""A folder that appears complete or not at all.

The content is written into a hidden folder beside the target and swapped in when it is whole, so a kill at any moment
leaves the old folder or the new one. Linux exchanges two folders in one step (renameat2); elsewhere the old one is
renamed away first.
"""

import ctypes
import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3_lit.errors import UserError

logger = logging.getLogger(__name__)

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def swapped_folder(target: Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends without an exception.

    Args:
        target: the final place; parents are made.
        replaceable: whether a non-empty folder that is there already may be replaced.

    Raises:
        UserError: ``target`` is a file, or a folder that may not be replaced.
        OSError: the disk is full; it names ``target``.
    """
    target = Path(os.path.abspath(target))
    recover(target)
    if target.is_symlink():
        target = target.resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file, expected a folder to write; choose another one")
    if target.is_dir() and any(target.iterdir()) and not replaceable(target):
        raise UserError(f"{target}: holds files but no checkpoint, and is not replaced; choose an empty or new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    incoming = _beside(target, "incoming")
    shutil.rmtree(incoming, ignore_errors=True)  # left by a run that was killed
    incoming.mkdir()
    try:
        yield incoming
    except BaseException as error:
        shutil.rmtree(incoming, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            # It names no path, or the file that was being copied.
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    _swap_in(incoming, target)


def recover(target: Path) -> None:
    """Put the former folder back if a kill hit between the two renames of a system without an exchange."""
    old = _beside(Path(os.path.abspath(target)), "old")
    if old.is_dir() and not target.exists():
        os.replace(old, target)
        logger.warning("%s: writing it was interrupted; the folder before it is back in place", target)


def _beside(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}")


def _swap_in(incoming: Path, target: Path) -> None:
    old = _beside(target, "old")
    if not target.exists():
        os.rename(incoming, target)
    elif _exchange(incoming, target):
        shutil.rmtree(incoming)
    else:
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(incoming, target)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(a), os.fsencode(b)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))
