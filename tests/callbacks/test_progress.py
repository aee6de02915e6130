"""The line that says where a run stands."""

import sys
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ProgressBar

from qwen3_lit.callbacks.progress import Progress, duration, quantity
from qwen3_lit.data.batch import PackedBatch
from qwen3_lit.errors import UserError


def test_plain_lines_where_the_output_is_no_terminal(fit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fit([Progress(line_seconds=1e-9)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines][:4] == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
    assert all("loss " in line and "tok/s" in line and " GB" in line for line in lines[:4])
    assert "ETA ?" in lines[0] and "ETA" not in lines[-1]
    assert "MFU" not in lines[0] and "\x1b" not in "".join(lines)


def test_few_lines_in_a_short_run(fit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fit([Progress(line_seconds=3600)])
    assert len(capsys.readouterr().out.splitlines()) == 1, "only the last step"


def test_bar_in_a_terminal_leaves_the_log_handlers_as_they_were(
    fit: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = Progress(refresh_seconds=1e-9)
    fit([progress])
    assert "4/4" in capsys.readouterr().out
    assert progress._bar is None and progress._streams == []


@pytest.mark.parametrize("per_batch", [0, 2])
def test_manual_optimization_with_several_or_no_steps_a_batch(
    fit: Any, make_phase: Any, capsys: pytest.CaptureFixture[str], per_batch: int
) -> None:
    kind = type(make_phase())

    class Manual(kind):  # type: ignore[misc, valid-type]
        """Takes per_batch optimizer steps in each training_step; rolls out before."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.automatic_optimization = False

        def training_step(self, batch: PackedBatch, batch_idx: int) -> None:
            self.counters.rollout_tokens += 50
            self.counters.rollout_seconds += 1e-4
            self.log("reward", 0.25, prog_bar=True)
            for _ in range(per_batch):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(self.run_model(batch).hidden_TD.square().mean())
                optimizer.step()

    limits = {"max_steps": 4} if per_batch else {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 3}
    fit([Progress(line_seconds=1e-9)], module=make_phase(kind=Manual), **limits)
    lines = capsys.readouterr().out.splitlines()
    places = [line.split("  ")[0] for line in lines]
    assert places[:2] == (["step 2/4", "step 4/4"] if per_batch else ["step 1/3", "step 2/3"])
    assert "reward 0.25" in lines[0] and "rollout " in lines[0]


def test_time_left_ignores_the_first_steps(monkeypatch: pytest.MonkeyPatch, make_phase: Any) -> None:
    now = [0.0]
    monkeypatch.setattr("qwen3_lit.callbacks.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("qwen3_lit.callbacks.progress.steps_done", lambda trainer: trainer.done)
    trainer: Any = type("Trainer", (), {"done": 0})()
    progress, module = Progress(warmup_steps=2, line_seconds=1e9), make_phase()
    progress.on_train_start(trainer, module)
    progress.on_train_batch_start(trainer, module, None, 0)
    for step, seconds in enumerate([100.0, 60.0, 2.0, 2.0, 2.0], start=1):
        now[0] += seconds
        trainer.done = step
        progress.on_train_batch_end(trainer, module, None, None, step)
    assert progress._seconds_left(5, 105) == pytest.approx(200.0)
    assert progress._seconds_left(5, None) is None


def test_ranks_beside_the_first_are_silent(fit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(line_seconds=1e-9)
    progress.disable()
    fit([progress])
    assert capsys.readouterr().out == ""


def test_readable_numbers() -> None:
    assert [duration(s) for s in (None, 8.2, 125, 3723, 273600)] == ["?", "8 s", "2:05", "1:02:03", "3 d 4 h"]
    assert [quantity(n) for n in (950, 7520, 1.2e6)] == ["950", "7.52k", "1.2M"]


def test_bad_interval_is_refused() -> None:
    with pytest.raises(UserError, match="progress.line_seconds: seen 0"):
        Progress(line_seconds=0)


def test_the_trainer_adds_no_bar_of_its_own(make_trainer: Any) -> None:
    trainer: L.Trainer = make_trainer([Progress()])
    bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
    assert [type(bar) for bar in bars] == [Progress]
