"""Distributed checkpoints: every rank writes its shards in the background, a complete folder appears at once.

Layout of a folder: ``*.distcp`` and ``.metadata`` (weights and optimizers, torch.distributed.checkpoint), ``meta.pt``
(what rank 0 knows besides: loops, callbacks, data), ``rank_<r>.pt`` (the same of every rank: data position, random
generators). It is written as ``.incomplete-<name>`` beside its final place and renamed when every rank has finished, so
a folder under its final name is complete, whenever the run was killed.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from qwen3_lit.errors import UserError

logger = logging.getLogger(__name__)

METADATA_FILE = "meta.pt"
INCOMPLETE_PREFIX = ".incomplete-"
OLD_PREFIX = ".old-"


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` is a distributed checkpoint that can be loaded."""
    return folder.is_dir() and (folder / ".metadata").is_file() and (folder / METADATA_FILE).is_file()


def require_complete(folder: Path) -> None:
    """Raises UserError that says what is missing in ``folder``."""
    if not folder.exists():
        raise UserError(f"{folder}: no such checkpoint")
    for name in (".metadata", METADATA_FILE):
        if folder.is_dir() and not (folder / name).is_file():
            raise UserError(
                f"{folder}: not a complete distributed checkpoint, {name} is missing; resume from another one"
            )


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights, gathered on rank 0's CPU (empty on the others), for an export. Every rank has to call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


class CheckpointWriter:
    """Writes one checkpoint at a time in a background thread, with a process group of its own for the coordination.

    torch's own ``async_save`` gives no place to commit the folder between "all ranks wrote" and "done", and keeps CPU
    tensors by reference in some versions; ``dcp.save`` in our thread does the same work with both under control.
    """

    def __init__(self, *, asynchronous: bool = True) -> None:
        """Every rank has to build it at the same point: it opens a gloo group, apart from the training's collectives.

        Args:
            asynchronous: False writes before `save` returns.
        """
        self.asynchronous = asynchronous
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._complete = True
        self._removals: list[Path] = []
        self._removals_lock = threading.Lock()

    def save(self, state: dict[str, Any], rest: dict[str, Any], folder: Path) -> None:
        """Saves ``state`` (sharded, the same keys on every rank) and ``rest`` (this rank's own) to ``folder``.

        Waits for the save before, copies, then writes in the background. Every rank has to call it.

        Raises:
            OSError, CheckpointException: what went wrong in the save *before* this one, or in this one when
            synchronous.
        """
        self.wait()
        # What a failed save left here is not deleted by a later one, which may have written under the same name.
        self._complete, self._removals = False, []
        incomplete = folder.with_name(INCOMPLETE_PREFIX + folder.name)
        if self._rank == 0:
            shutil.rmtree(incomplete, ignore_errors=True)
            incomplete.mkdir(parents=True)
        self._barrier()
        state, rest = _cpu_copy(state), _cpu_copy(rest)
        if not self.asynchronous:
            self._write(state, rest, incomplete, folder)
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = self._executor.submit(self._write, state, rest, incomplete, folder)

    def remove(self, folder: Path) -> None:
        """Deletes an old checkpoint (rank 0 only) once the newest save is complete, and never if that fails: there is
        always one."""
        with self._removals_lock:
            self._removals.append(folder)
        if self._complete:
            self._flush_removals()

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises what went wrong in the background."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finishes the save under way and ends the thread."""
        try:
            self.wait()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = None

    def _write(self, state: dict[str, Any], rest: dict[str, Any], incomplete: Path, folder: Path) -> None:
        _save_file(rest, incomplete / f"rank_{self._rank}.pt")
        if self._rank == 0:
            _save_file(rest, incomplete / METADATA_FILE)
        dcp.save(state, checkpoint_id=incomplete, process_group=self._group, no_dist=self._group is None)
        # dcp.save returns on rank 0 when all shards are there; the barrier adds the ranks' own files.
        self._barrier()
        if self._rank == 0:
            commit(incomplete, folder)
            self._complete = True
            self._flush_removals()
        self._barrier()

    def _flush_removals(self) -> None:
        with self._removals_lock:
            removals, self._removals = self._removals, []
        for folder in removals:
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
            else:
                folder.unlink(missing_ok=True)

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)


def commit(incomplete: Path, folder: Path) -> None:
    """Moves a finished folder to its final name; one that was there before is set aside first and then deleted."""
    old = folder.with_name(OLD_PREFIX + folder.name)
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        os.replace(folder, old)
    os.replace(incomplete, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Puts the former ``folder`` back if the run was killed in the instant between `commit`'s two renames."""
    old = folder.with_name(OLD_PREFIX + folder.name)
    if not folder.exists() and is_complete(old):
        os.replace(old, folder)
        logger.warning("%s: a save was interrupted, the checkpoint before it is used", folder)


def load_rest(folder: Path, rank: int, world_size: int, *, weights_only: bool | None = None) -> dict[str, Any]:
    """This rank's own part when the number of ranks is the same as then, else rank 0's (which says so in the log)."""
    saved = len(list(folder.glob("rank_*.pt")))
    name = f"rank_{rank}.pt" if saved == world_size else METADATA_FILE
    if saved != world_size and rank == 0:
        logger.warning(
            "%s was saved by %d ranks and is loaded by %d: weights, optimizer and rank 0's loop and data position "
            "are restored, random generators of single ranks are not",
            folder,
            saved,
            world_size,
        )
    rest: dict[str, Any] = torch.load(folder / name, map_location="cpu", weights_only=weights_only)
    rest["saved_world_size"] = saved
    return rest


def _save_file(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _cpu_copy(value: Any) -> Any:
    """A deep copy whose tensors lie on the CPU and share nothing with the original, which training goes on to
    change."""
    # A DTensor keeps its mesh, and its local part goes to the CPU; `DTensor.from_local` would move that part back.
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) in (dict, list, tuple):
        items = [_cpu_copy(item) for item in (value.values() if isinstance(value, dict) else value)]
        return dict(zip(value, items, strict=True)) if isinstance(value, dict) else type(value)(items)
    return copy.deepcopy(value)
