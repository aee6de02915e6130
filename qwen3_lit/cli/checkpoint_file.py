"""Lightning's checkpoint files, written so that a file under its final name is whole.

Lightning's own writer makes a file in ``$TMPDIR`` and moves it; from one file system to another that is a copy onto the
final name, which a full disk or a kill cuts off.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from qwen3_lit.data.atomic_files import DISK_FULL, new_file


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames. Distributed checkpoints do not pass here: their folders do the same."""

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to the file ``path``.

        Raises:
            OSError: the disk is full; it names ``path``, and nothing is left there.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options: seen {storage_options!r}, expected None: checkpoints are local files")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_file(target) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch's zip writer complains of its position when the write below it failed.
                if full := _full_disk(error):
                    raise OSError(full.errno, full.strerror, str(target)) from error
                raise
            file.flush()
            os.fsync(file.fileno())


def _full_disk(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return error
        error = error.__cause__ or error.__context__
    return None
