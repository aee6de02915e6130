"""A folder under its final name is complete, whatever dies when; the copy is taken before training goes on."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from qwen3_lit.distributed import checkpoint
from qwen3_lit.distributed.checkpoint import (
    CheckpointWriter,
    _cpu_copy,
    commit,
    is_complete,
    load_rest,
    recover,
    require_complete,
)
from qwen3_lit.errors import UserError


def load(folder: Path) -> torch.Tensor:
    state = {"weight": torch.zeros(4)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state["weight"]


def slow_save(gate: threading.Event):
    original = dcp.save

    def save(*args, **kwargs):
        assert gate.wait(30)
        return original(*args, **kwargs)

    return mock.patch.object(checkpoint.dcp, "save", save)


def test_background_save_keeps_the_values_of_the_call_and_appears_when_complete(tmp_path: Path) -> None:
    folder, gate = tmp_path / "step=1.ckpt", threading.Event()
    writer, weight, rest = CheckpointWriter(), torch.ones(4), {"data": [torch.zeros(2)], "step": 1}
    with slow_save(gate):
        writer.save({"weight": weight}, rest, folder)
        weight.fill_(9.0)
        rest["data"][0].fill_(9.0)
        rest["step"] = 2
        assert not folder.exists()
        gate.set()
        writer.close()
    assert is_complete(folder) and os.listdir(tmp_path) == [folder.name]
    torch.testing.assert_close(load(folder), torch.ones(4))
    loaded = load_rest(folder, 0, 1)
    assert loaded["step"] == 1 and loaded["saved_world_size"] == 1
    torch.testing.assert_close(loaded["data"][0], torch.zeros(2))


def test_overwrites_and_never_removes_the_last_complete_one(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    writer, gate = CheckpointWriter(), threading.Event()
    writer.save({"weight": torch.ones(4)}, {}, first)
    writer.wait()
    with slow_save(gate):
        writer.save({"weight": torch.full((4,), 2.0)}, {}, second)
        writer.remove(first)
        assert is_complete(first), "the old one has to outlive the save under way"
        gate.set()
        writer.wait()
    assert is_complete(second) and not first.exists()
    writer.save({"weight": torch.full((4,), 3.0)}, {}, second)
    writer.close()
    torch.testing.assert_close(load(second), torch.full((4,), 3.0))
    assert os.listdir(tmp_path) == ["b"]


def test_a_failed_save_is_reported_and_leaves_the_old_one(tmp_path: Path) -> None:
    folder, writer = tmp_path / "last.ckpt", CheckpointWriter()
    writer.save({"weight": torch.ones(4)}, {}, folder)
    writer.wait()
    with mock.patch.object(checkpoint.dcp, "save", side_effect=OSError(28, "No space left on device")):
        writer.save({"weight": torch.zeros(4)}, {}, folder)
        with pytest.raises(OSError, match="No space"):
            writer.wait()
    torch.testing.assert_close(load(folder), torch.ones(4))
    writer.save({"weight": torch.zeros(4)}, {}, folder)
    writer.close()
    torch.testing.assert_close(load(folder), torch.zeros(4))


def test_a_failed_save_removes_nothing(tmp_path: Path) -> None:
    old, new, writer = tmp_path / "old.ckpt", tmp_path / "new.ckpt", CheckpointWriter()
    writer.save({"weight": torch.ones(4)}, {}, old)
    writer.wait()
    with mock.patch.object(checkpoint.dcp, "save", side_effect=OSError(28, "No space left on device")):
        writer.save({"weight": torch.zeros(4)}, {}, new)
        assert writer._pending is not None and writer._pending.exception(30) is not None
        writer.remove(old)
        assert is_complete(old)
        with pytest.raises(OSError, match="No space"):
            writer.wait()
    writer.remove(old)
    assert is_complete(old) and not new.exists()
    writer.save({"weight": torch.full((4,), 2.0)}, {}, old)
    writer.close()
    torch.testing.assert_close(load(old), torch.full((4,), 2.0))


KILLED = """
import os, sys, torch
from pathlib import Path
from qwen3_lit.distributed import checkpoint
writer = checkpoint.CheckpointWriter(asynchronous=False)
folder = Path(sys.argv[1])
writer.save({"weight": torch.ones(4)}, {}, folder)
setattr(checkpoint, sys.argv[2], lambda *a, **k: os._exit(9)) if hasattr(checkpoint, sys.argv[2]) else None
if sys.argv[2] == "second rename":
    calls, replace = [], os.replace
    def dying(a, b):
        calls.append(a)
        if len(calls) == 2: os._exit(9)
        replace(a, b)
    import torch.distributed.checkpoint as dcp
    commit = checkpoint.commit
    def armed(*a):
        os.replace = dying
        commit(*a)
    checkpoint.commit = armed
writer.save({"weight": torch.zeros(4)}, {}, folder)
"""


@pytest.mark.parametrize("where", ["_save_file", "commit", "second rename"])
def test_a_kill_at_any_point_leaves_a_complete_checkpoint(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "last.ckpt"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), where], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    recover(folder)
    assert is_complete(folder)
    torch.testing.assert_close(load(folder), torch.ones(4))
    writer = CheckpointWriter(asynchronous=False)
    writer.save({"weight": torch.full((4,), 5.0)}, {}, folder)
    torch.testing.assert_close(load(folder), torch.full((4,), 5.0))
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_incomplete_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        require_complete(tmp_path / "missing")
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match=".metadata is missing"):
        require_complete(tmp_path / "half")


def test_commit_replaces_a_link(tmp_path: Path) -> None:
    new, link = tmp_path / "new", tmp_path / "last.ckpt"
    new.mkdir()
    link.symlink_to(tmp_path / "elsewhere")
    commit(new, link)
    assert link.is_dir() and not link.is_symlink()


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_copy_of_a_sharded_tensor_lies_on_the_cpu_whatever_its_mesh(tmp_path: Path, device_type: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = DeviceMesh(device_type, [0], mesh_dim_names=("data",), _init_backend=False, _rank=0)
        original = torch.arange(6.0).view(3, 2)
        spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(original.shape, original.stride(), original.dtype))
        copied = _cpu_copy({"weight": DTensor(original, spec, requires_grad=True)})["weight"]
        original.fill_(9.0)
        assert copied.device_mesh == mesh and copied.placements == (Shard(0),) and not copied.requires_grad
        assert copied.to_local().device.type == "cpu"
        torch.testing.assert_close(copied.to_local(), torch.arange(6.0).view(3, 2))
    finally:
        dist.destroy_process_group()
