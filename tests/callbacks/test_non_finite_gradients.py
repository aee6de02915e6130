"""A gradient that is not finite ends the run, and nothing of the weights behind it is kept."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from qwen3_lit.callbacks.hf_export import HFExport
from qwen3_lit.callbacks.run_report import RunReport
from qwen3_lit.data.batch import PackedBatch
from qwen3_lit.errors import UserError
from qwen3_lit.modules.phase_module import PhaseModule

BAD_STEP = 2


class Spiking(PhaseModule):
    """Next-token prediction whose loss is not a number at one step."""

    bad_step = BAD_STEP

    def spiking_loss(self, batch: PackedBatch) -> torch.Tensor:
        return self.language_model_step(batch) * (float("nan") if self.global_step + 1 == self.bad_step else 1.0)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> torch.Tensor | None:
        return self.spiking_loss(batch)

    def evaluate(self) -> dict[str, float]:
        return {"finite": float(all(p.isfinite().all() for p in self.parameters()))}


class SpikingByHand(Spiking):
    """The same under manual optimization, as the phases do that generate."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: PackedBatch, batch_idx: int) -> None:
        optimizer = self.begin_optimizer_step()
        self.manual_backward(self.spiking_loss(batch))
        self.end_optimizer_step(optimizer)


@pytest.mark.parametrize("kind", [Spiking, SpikingByHand])
@pytest.mark.parametrize("every_checkpoint", [False, True])
def test_the_checkpoint_before_the_bad_step_stays_the_newest_and_continues(
    kind: type[Spiking], every_checkpoint: bool, fit: Any, make_phase: Any, tmp_path: Path
) -> None:
    callbacks = [RunReport(), HFExport(every_checkpoint=every_checkpoint)]
    with pytest.raises(UserError, match=r"gradient norm of step 2 is not finite.*the same command continues there"):
        fit(callbacks, module=make_phase(kind=kind), max_steps=5)
    root = tmp_path / "phase"
    (checkpoint,) = (root / "checkpoints").iterdir()
    assert checkpoint.name == "step=00000001.ckpt"
    state = torch.load(checkpoint, weights_only=False)
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert not (root / "hf").exists() and not (root / "phase.json").exists()
    assert [path.name for path in root.glob("hf_steps/*")] == ["step=00000001"] * every_checkpoint

    healed = make_phase(kind=kind)
    healed.bad_step = 0
    _, trainer = fit(module=healed, max_steps=5)
    assert trainer.global_step == 5 and (root / "hf" / "config.json").exists()


def test_weights_under_manual_optimization_are_as_before_the_bad_step(fit: Any, make_phase: Any) -> None:
    module = make_phase(kind=SpikingByHand)
    with pytest.raises(UserError, match="step 2"):
        fit([], module=module, max_steps=5)
    assert all(p.isfinite().all() for p in module.parameters())


class NoSaves(L.Callback):
    """Turns off the checkpoints of the fixture's trainer."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.checkpoint_callback.save_top_k = 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("log_every_n_steps", "stopped_at"), [(1, 2), (3, 3), (50, 5)])
def test_without_checkpoints_the_run_stops_at_the_next_log_step_or_its_end(
    fit: Any, make_phase: Any, tmp_path: Path, log_every_n_steps: int, stopped_at: int
) -> None:
    module = make_phase(kind=Spiking)
    with pytest.raises(UserError, match="gradient norm of step 2 is not finite"):
        fit([NoSaves(), RunReport(), HFExport()], module=module, max_steps=5, log_every_n_steps=log_every_n_steps)
    assert module.global_step == stopped_at
    assert not (tmp_path / "phase" / "hf").exists() and not (tmp_path / "phase" / "phase.json").exists()
