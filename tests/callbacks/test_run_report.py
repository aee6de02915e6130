"""The record of a phase: measured once before, once after, only when the phase ended by itself."""

import json
import os
import shutil
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


class StopAt(L.Callback):
    """Raises in the middle of a phase."""

    def __init__(self, step: int, error: type[BaseException]) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error("stopped by the test")


def record(root: Path) -> dict[str, Any]:
    return json.loads((root / "phase" / "phase.json").read_text())


def test_a_finished_phase_has_a_whole_record(fit: Any, tmp_path: Path) -> None:
    module, _ = fit()
    found = record(tmp_path)
    assert found["name"] == "phase" and found["steps"] == 4 and found["module"] == "TinyPhase"
    (first_step, before), (last_step, after) = module.evaluations
    assert (first_step, last_step) == (0, 4)
    assert found["before"] == {"weight": before} and found["after"] == {"weight": after} and before != after
    assert found["metrics"] == {"weight_before": before, "weight_after": after}
    assert found["seconds"] > 0 and "eval_seconds" in found and found["tokens"] == 4 * 32
    assert found["versions"]["torch"] and found["model"]["experts"] == 4
    assert module.training, "evaluation gives the training mode back"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_phase_leaves_no_record_and_resumes_with_the_figures_of_step_0(
    fit: Any, tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises((SystemExit, RuntimeError)):
        fit([RunReport(), HFExport(), StopAt(2, error)])
    assert not (tmp_path / "phase" / "phase.json").exists()
    assert not (tmp_path / "phase" / "hf").exists()
    untrained = json.loads((tmp_path / "phase" / "before.json").read_text())["figures"]

    module, _ = fit()
    assert [step for step, _ in module.evaluations] == [4], "nothing half-trained is taken for the untrained model"
    assert record(tmp_path)["before"] == untrained


def test_evaluation_does_not_move_the_training(fit: Any, tmp_path: Path) -> None:
    plain, _ = fit([], resume=False)
    evaluated, _ = fit([RunReport()], resume=False)
    assert plain.step_losses == evaluated.step_losses


def test_figures_before_survive_the_loss_of_their_file(fit: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fit([RunReport(), StopAt(2, RuntimeError)])
    file = tmp_path / "phase" / "before.json"
    untrained = json.loads(file.read_text())["figures"]
    file.unlink()
    fit()
    assert record(tmp_path)["before"] == untrained


def test_a_run_killed_before_its_first_checkpoint_evaluates_once(fit: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fit([RunReport(), StopAt(2, RuntimeError)])
    module, _ = fit(resume=False)  # as if no checkpoint had been written
    assert [step for step, _ in module.evaluations] == [4]


def test_another_recipe_in_the_same_folder_evaluates_anew(fit: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "phase" / "config.yaml"
    recipe.parent.mkdir()
    recipe.write_text("model: {a: 1}\n")
    with pytest.raises(RuntimeError):
        fit([RunReport(), StopAt(1, RuntimeError)])
    recipe.write_text("model: {a: 2}\n")
    module, _ = fit(resume=False)
    assert [step for step, _ in module.evaluations] == [0, 4]


def test_a_finished_phase_started_again_keeps_its_record(fit: Any, tmp_path: Path) -> None:
    fit()
    text = (tmp_path / "phase" / "phase.json").read_text()
    weights = (tmp_path / "phase" / "hf" / "model.safetensors").stat().st_mtime_ns
    module, _ = fit()
    assert module.evaluations == [] and module.step_losses == []
    assert (tmp_path / "phase" / "phase.json").read_text() == text
    assert (tmp_path / "phase" / "hf" / "model.safetensors").stat().st_mtime_ns == weights


def test_a_phase_killed_in_its_last_evaluation_is_finished_by_the_next_start(
    fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = RunReport._evaluate

    def die_at_the_end(self: RunReport, trainer: Any, module: Any, stage: str) -> dict[str, float]:
        if stage == "after":
            raise RuntimeError("killed")
        return evaluate(self, trainer, module, stage)

    monkeypatch.setattr(RunReport, "_evaluate", die_at_the_end)
    with pytest.raises(RuntimeError):
        fit()
    monkeypatch.undo()
    assert not (tmp_path / "phase" / "phase.json").exists()
    module, _ = fit()
    assert module.step_losses == [], "all steps were saved before the evaluation began"
    found = record(tmp_path)
    assert found["steps"] == 4 and found["seconds"] > 0
    assert found["before"]["weight"] != found["after"]["weight"] == module.evaluations[0][1]
    assert (tmp_path / "phase" / "hf" / "config.json").exists()


def test_training_on_removes_the_old_record_first(fit: Any, tmp_path: Path) -> None:
    fit()
    seconds = record(tmp_path)["seconds"]
    with pytest.raises(RuntimeError):
        fit([RunReport(), HFExport(), StopAt(5, RuntimeError)], max_steps=6)
    assert not (tmp_path / "phase" / "phase.json").exists()
    fit(max_steps=6)
    found = record(tmp_path)
    assert found["steps"] == 6 and found["seconds"] > seconds


def test_a_trial_run_leaves_nothing(fit: Any, tmp_path: Path) -> None:
    fit(fast_dev_run=1)
    assert not (tmp_path / "phase" / "phase.json").exists() and not (tmp_path / "phase" / "hf").exists()


def test_the_record_counts_the_work_of_all_ranks(tokenizer_dir: str, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment = {**os.environ, "MASTER_PORT": str(probe.getsockname()[1])}
    command = [sys.executable, str(Path(__file__).with_name("report_rank.py"))]
    options: dict[str, Any] = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], **options) for rank in range(2)]
    for process in ranks:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-3000:]
    found = json.loads((tmp_path / "phase.json").read_text())
    assert found["tokens"] == 2 * 2 * 32, "two steps of a row on two ranks"
    assert found["rollout_tokens"] == 2 * (10 + 11)
    assert found["rollout_seconds"] == 2 * 2.0, "ranks generate at the same time: the slowest counts"


def test_evaluation_computes_as_training_does(fit: Any, make_phase: Any) -> None:
    class Watching(type(make_phase())):  # type: ignore[misc]
        def evaluate(self) -> dict[str, float]:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().evaluate()

    for precision in ("bf16-mixed", "32-true"):
        seen: list[bool] = []
        fit([RunReport()], module=make_phase(kind=Watching), resume=False, max_steps=1, precision=precision)
        assert seen and set(seen) == {precision == "bf16-mixed"}
