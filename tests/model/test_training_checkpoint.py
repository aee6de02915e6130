"""A training checkpoint from elsewhere: nothing in it runs, and whatever is damaged is one line."""

import dataclasses
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from qwen3_lit.errors import UserError
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.training_checkpoint import read_training_checkpoint
from qwen3_lit.model.transformer import Qwen3

CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=4,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=2,
)


class Bomb:
    """Makes a folder when it is unpickled by the rules of pickle."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.target,)


def eval_by_dots(expression: str) -> bytes:
    """A pickle of protocol 4 that reaches eval through the globals of a function that torch's own pickles name."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    get = text("torch._utils") + text("_rebuild_tensor.__builtins__.get") + pickle.STACK_GLOBAL
    found = get + text("eval") + pickle.TUPLE1 + pickle.REDUCE
    return b"\x80\x04" + found + text(expression) + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP


@pytest.fixture
def model() -> Qwen3:
    torch.manual_seed(0)
    return Qwen3(CONFIG)


@pytest.fixture
def ckpt(model: Qwen3, tmp_path: Path) -> Path:
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state["model.norm.weight"] = torch.nn.Parameter(state["model.norm.weight"])
    hyper_parameters = {"config": dataclasses.asdict(CONFIG), "dtype": torch.bfloat16, "shape": torch.Size([2])}
    optimizer = {"quantized": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    file = tmp_path / "a.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": hyper_parameters, "optimizer_states": [optimizer]}, file)
    return file


@pytest.fixture
def distributed(model: Qwen3, tmp_path: Path) -> Path:
    folder = tmp_path / "distributed"
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    dcp.save({"state_dict": state, "optimizer_0": {"step": 3}}, checkpoint_id=folder, no_dist=True)
    torch.save({"phase": {"config": dataclasses.asdict(CONFIG)}}, folder / "meta.pt")
    return folder


def with_pickle(ckpt: Path, content: bytes, target: Path, name: str = "data.pkl") -> Path:
    """A copy of ``ckpt`` whose pickle is ``content``, with checksums that are right."""
    with zipfile.ZipFile(ckpt) as source, zipfile.ZipFile(target, "w") as written:
        for record in source.namelist():
            written.writestr(record, content if record.endswith(f"/{name}") else source.read(record))
    return target


def pickle_of(ckpt: Path) -> bytes:
    with zipfile.ZipFile(ckpt) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def read_all(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_training_checkpoint(path)
    return {name: checkpoint.weights[name] for name in checkpoint.weights}


def test_both_kinds_read_bit_for_bit(model: Qwen3, ckpt: Path, distributed: Path) -> None:
    for path in (ckpt, distributed):
        checkpoint = read_training_checkpoint(path)
        assert checkpoint.config == CONFIG
        assert checkpoint.weights.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(checkpoint.weights[name], value), name


def test_a_metadata_file_runs_nothing(distributed: Path, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    with (distributed / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data = Bomb(target)
    (distributed / ".metadata").write_bytes(pickle.dumps(metadata))
    read_all(distributed)
    assert not target.exists()
    for content in (pickle.dumps(Bomb(target)), eval_by_dots(f"__import__('os').mkdir({str(target)!r})")):
        (distributed / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match=r"\.metadata.*damaged"):
            read_all(distributed)
        assert not target.exists()


def test_a_name_with_dots_leads_nowhere(ckpt: Path, distributed: Path, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    payload = eval_by_dots(f"__import__('os').mkdir({str(target)!r})")
    with_pickle(ckpt, payload, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=r"bad\.ckpt"):
        read_all(tmp_path / "bad.ckpt")
    with_pickle(ckpt, payload, distributed / "meta.pt")
    with pytest.raises(UserError, match="configuration"):
        read_all(distributed)
    assert not target.exists()


class Script(torch.nn.Module):
    """TorchScript runs __setstate__ when the archive is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    @torch.jit.export
    def __getstate__(self) -> tuple[int, bool]:
        return 1, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]) -> None:
        print("TorchScript ran")
        self.training = state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_not_opened(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.jit.script(Script()).save(str(tmp_path / "a.ckpt"))
    capfd.readouterr()
    with pytest.raises(UserError, match="TorchScript"):
        read_training_checkpoint(tmp_path / "a.ckpt")
    assert "ran" not in capfd.readouterr().out


def test_damaged_files_are_one_line(ckpt: Path, distributed: Path, tmp_path: Path) -> None:
    """A few bytes of a pickle changed: it reads, or it is refused; nothing else comes out."""
    draw = random.Random(0)
    refused = 0
    for kind in ("ckpt", "metadata") * 60:
        pickled = bytearray(pickle_of(ckpt) if kind == "ckpt" else (distributed / ".metadata").read_bytes())
        for _ in range(draw.choice((1, 3, 10))):
            pickled[draw.randrange(len(pickled))] = draw.randrange(256)
        if kind == "ckpt":
            path = with_pickle(ckpt, bytes(pickled), tmp_path / "bad.ckpt")
        else:
            path = shutil.copytree(distributed, tmp_path / "bad", dirs_exist_ok=True)
            (path / ".metadata").write_bytes(pickled)
        try:
            read_all(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 30
