"""Checkpoint files: whole or absent, and what a run continues from."""

import errno
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from qwen3_lit.cli.checkpoint_file import WholeFileCheckpointIO
from qwen3_lit.cli.lightning_cli import PhaseCLI
from qwen3_lit.cli.resume_point import is_complete, newest_checkpoint, resolve_checkpoint
from qwen3_lit.errors import UserError

CONTENT = {"state_dict": {"w": torch.arange(5000.0)}, "global_step": 3}


def _save(folder: Path, step: int) -> Path:
    path = folder / f"step={step:08d}.ckpt"
    WholeFileCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


def test_a_saved_file_is_whole_and_alone(tmp_path: Path) -> None:
    path = _save(tmp_path / "checkpoints", 3)
    assert is_complete(path) and list(path.parent.iterdir()) == [path]
    loaded = WholeFileCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["w"], CONTENT["state_dict"]["w"])  # type: ignore[index]


class _FullDisk:
    """A file that takes 4,000 bytes."""

    def __init__(self, path: str, mode: str) -> None:
        self.path, self.mode, self.left = path, mode, 4000

    def __enter__(self) -> "_FullDisk":
        self.file: Any = Path(self.path).open(self.mode)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(data))


def test_a_full_disk_names_the_file_and_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _save(tmp_path, 3)
    before = path.read_bytes()
    monkeypatch.setattr("qwen3_lit.cli.checkpoint_file.open", _FullDisk, raising=False)
    for target in (path, path.with_name("step=00000004.ckpt")):
        with pytest.raises(OSError, match="No space left") as error:
            WholeFileCheckpointIO().save_checkpoint(CONTENT, target)
        assert error.value.filename == str(target)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_the_next_save_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    leftover = tmp_path / f".step=00000003.ckpt.{2**22 + 1}.tmp"
    leftover.write_bytes(b"half")
    path = _save(tmp_path, 3)
    assert list(tmp_path.iterdir()) == [path]


def test_every_run_writes_its_checkpoints_this_way(tmp_path: Path) -> None:
    cli = PhaseCLI.__new__(PhaseCLI)
    cli.trainer_class, cli.trainer_defaults, cli.save_config_callback = L.Trainer, {}, None
    for plugins in (None, []):
        config = {"plugins": plugins, "logger": False, "default_root_dir": str(tmp_path), "callbacks": None}
        trainer = cli._instantiate_trainer(config, [])
        assert isinstance(trainer.strategy.checkpoint_io, WholeFileCheckpointIO)


def test_a_cut_off_checkpoint_gives_way_to_an_older_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, cut = _save(tmp_path, 3), _cut(_save(tmp_path, 5))
    (tmp_path / ".incomplete-step=00000007.ckpt").mkdir()
    with caplog.at_level(logging.WARNING):
        assert resolve_checkpoint(None, tmp_path) == whole
    assert f"{cut} was not written to its end: {whole} is used instead" in caplog.text
    assert "incomplete-" not in caplog.text
    with pytest.raises(UserError, match="not written to its end"):
        resolve_checkpoint(str(cut), tmp_path)


def test_cut_off_checkpoints_alone_are_an_error_and_hidden_work_is_none(tmp_path: Path) -> None:
    (tmp_path / ".incomplete-step=00000007.ckpt").mkdir()
    assert newest_checkpoint(tmp_path) is None
    cut = _cut(_save(tmp_path, 5))
    with pytest.raises(UserError, match=rf"{cut.name}: not written to its end.*delete it to start anew"):
        newest_checkpoint(tmp_path)
