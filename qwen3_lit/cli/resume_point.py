"""Which checkpoint a run continues from: the newest complete one in its own folder.

Lightning's ``last`` is a link that is replaced after the older checkpoint was removed, so a kill between the two leaves
it dangling; it also only warns when nothing is there. Here the newest complete checkpoint is looked up by its step.
"""

import logging
import re
import zipfile
from pathlib import Path

from qwen3_lit.errors import UserError

_STEP = re.compile(r"step=(\d+)")

log = logging.getLogger(__name__)


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end: a folder gets its metadata last, a file its table of contents."""
    if path.is_dir():
        return (path / ".metadata").is_file() and (path / "meta.pt").is_file()
    try:
        with zipfile.ZipFile(path):
            return True
    except (OSError, zipfile.BadZipFile):
        return False


def step_of(path: Path) -> int | None:
    """The optimizer steps that a checkpoint's name says it has, None for another kind of name."""
    match = _STEP.search(path.name) if path.suffix == ".ckpt" else None
    return int(match[1]) if match else None


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in ``folder``, or None while there is none at all.

    Raises UserError when checkpoints are there and none is complete: training anew would lose their steps unasked.
    """
    found = [
        (step, path.stat().st_mtime_ns, path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.exists() and (step := step_of(path)) is not None
    ]
    cut_off: list[Path] = []
    for _, _, path in sorted(found, reverse=True):
        if is_complete(path):
            for newer in cut_off:
                log.warning("%s was not written to its end: %s is used instead", newer, path)
            return path
        if not path.name.startswith("."):  # a hidden one is the work that a kill left, which was never vouched for
            cut_off.append(path)
    if cut_off:
        names = ", ".join(map(str, cut_off))
        raise UserError(f"{names}: not written to its end, and there is no older checkpoint; delete it to start anew")
    return None


def resolve_checkpoint(wanted: str | None, folder: Path) -> Path | None:
    """The checkpoint to load for ``ckpt_path``: null and ``last`` mean the newest one of this run, or none yet.

    Raises UserError when a named checkpoint does not exist or was not written to its end, or none of the run was.
    """
    if wanted in (None, "last"):
        return newest_checkpoint(folder)
    path = Path(str(wanted))
    if not path.exists():
        newest = newest_checkpoint(folder)
        hint = f"the newest checkpoint of this run is {newest}" if newest else f"there is none in {folder}"
        raise UserError(f"ckpt_path {path}: no such checkpoint; {hint}; weights of another phase go into init_from")
    if not is_complete(path):
        raise UserError(
            f"ckpt_path {path}: not written to its end; expected a whole .ckpt file, or a folder with .metadata; null "
            "takes the newest whole one of this run"
        )
    return path
