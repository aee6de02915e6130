"""The folder that the next phase starts from."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from qwen3_lit.callbacks.hf_export import HFExport
from qwen3_lit.callbacks.run_report import RunReport
from qwen3_lit.errors import UserError
from qwen3_lit.model.hf_checkpoint import load_hf


def test_the_folder_holds_the_trained_weights_and_says_where_they_come_from(fit: Any, tmp_path: Path) -> None:
    module, _ = fit()
    folder = tmp_path / "phase" / "hf"
    loaded = load_hf(folder).state_dict()
    for name, weight in module.model.state_dict().items():
        assert torch.equal(loaded[name], weight), name
    phases = json.loads((folder / "provenance.json").read_text())["phases"]
    assert [(p["name"], p["module"], p["steps"]) for p in phases] == [("phase", "TinyPhase", 4)]
    card = (folder / "README.md").read_text()
    assert "# phase" in card and "mixture of 4 experts, 2 a token" in card and "| weight_after |" in card
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")], "nothing half-written is left"


def test_provenance_is_a_chain(fit: Any, make_phase: Any, tmp_path: Path) -> None:
    fit()
    first = tmp_path / "phase"
    first.rename(tmp_path / "first")
    fit(module=make_phase(init_from=str(tmp_path / "first" / "hf")), resume=False)
    phases = json.loads((tmp_path / "phase" / "hf" / "provenance.json").read_text())["phases"]
    assert [phase["name"] for phase in phases] == ["phase", "phase"] and phases[0]["steps"] == 4


def test_a_failed_export_leaves_the_old_folder(fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit()
    weights = (tmp_path / "phase" / "hf" / "model.safetensors").read_bytes()

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen3_lit.callbacks.hf_export.write_model_card", full_disk)
    with pytest.raises(OSError, match="No space"):
        fit(max_steps=6)
    assert (tmp_path / "phase" / "hf" / "model.safetensors").read_bytes() == weights
    monkeypatch.undo()
    fit(max_steps=6)
    assert (tmp_path / "phase" / "hf" / "model.safetensors").read_bytes() != weights


def test_ranks_fail_and_succeed_together(tokenizer_dir: str, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = str(Path(__file__).with_name("export_rank.py"))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(tmp_path), tokenizer_dir],
            env={**os.environ, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in ranks:
            process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "thesis"]


def test_kept_checkpoints_have_their_own_folders(fit: Any, tmp_path: Path) -> None:
    fit([RunReport(), HFExport(every_checkpoint=True)])
    assert [path.name for path in (tmp_path / "phase" / "hf_steps").iterdir()] == ["step=00000004"]
    assert len(list((tmp_path / "phase" / "checkpoints").glob("step=*.ckpt"))) == 1


def test_a_killed_export_is_made_up_for(fit: Any, tmp_path: Path) -> None:
    fit([RunReport()])
    assert not (tmp_path / "phase" / "hf").exists()
    module, _ = fit()
    assert module.step_losses == [] and (tmp_path / "phase" / "hf" / "config.json").exists()


@pytest.mark.parametrize("folder", ["", "/tmp/elsewhere", "../outside"])
def test_the_folder_stays_inside_the_run(folder: str) -> None:
    with pytest.raises(UserError, match="hf_export.folder"):
        HFExport(folder=folder)


def test_default_order_of_the_callbacks(make_trainer: Any) -> None:
    trainer: L.Trainer = make_trainer([RunReport(), HFExport()])
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert names[-3:] == ["PhaseCheckpoint", "RunReport", "HFExport"]
