"""Which checkpoint a run continues from: the newest complete one in its own folder.

Lightning's ``last`` is a link that is replaced after the older checkpoint was removed, so a kill between the two leaves
it dangling; it also only warns when nothing is there. Here the newest complete checkpoint is looked up by its step.
"""

import re
from pathlib import Path

from qwen3_lit.errors import UserError

_STEP = re.compile(r"step=(\d+)")


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end: files are renamed into place, folders get their metadata last."""
    if path.is_dir():
        return (path / ".metadata").is_file() and (path / "meta.pt").is_file()
    return path.is_file() and path.stat().st_size > 0


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in ``folder``, or None."""
    found = [
        (int(match[1]), path.stat().st_mtime_ns, path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.suffix == ".ckpt" and (match := _STEP.search(path.name)) and is_complete(path)
    ]
    return max(found)[2] if found else None


def resolve_checkpoint(wanted: str | None, folder: Path) -> Path | None:
    """The checkpoint to load for ``ckpt_path``: null and ``last`` mean the newest one of this run, or none yet.

    Raises UserError when a named checkpoint does not exist or was not written to its end.
    """
    if wanted in (None, "last"):
        return newest_checkpoint(folder)
    path = Path(str(wanted))
    if not path.exists():
        newest = newest_checkpoint(folder)
        hint = f"the newest checkpoint of this run is {newest}" if newest else f"there is none in {folder}"
        raise UserError(f"ckpt_path {path}: no such checkpoint; {hint}; weights of another phase go into init_from")
    if not is_complete(path):
        raise UserError(f"ckpt_path {path}: not complete; expected a .ckpt file, or a folder with .metadata")
    return path
