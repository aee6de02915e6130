"""How the tokens spread over the experts: heatmaps in TensorBoard and in the run folder, and an alarm for dead experts.

Legend: L MoE layers, E experts, W windows (spans of training steps).
"""

import io
import logging
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from qwen3_lit.callbacks.phase_record import is_trial
from qwen3_lit.data.atomic_files import write_bytes
from qwen3_lit.errors import UserError
from qwen3_lit.losses.reduction import sum_over_ranks
from qwen3_lit.modules.phase_module import PhaseModule

HEATMAP_FILE = "expert_load.png"
COUNTS_FILE = "expert_load.npz"
MAX_WINDOWS = 64

log = logging.getLogger(__name__)


class ExpertLoad(L.Callback):
    """Reads and clears ``PhaseModule.expert_load_LE``, summed over ranks. Dense models are left alone."""

    def __init__(self, every_n_steps: int = 50, dead_after_steps: int = 200) -> None:
        """
        Args:
            every_n_steps: batches between two heatmaps.
            dead_after_steps: batches without one token after which an expert is called dead, once a run.
        """
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("dead_after_steps", dead_after_steps)):
            if value < 1:
                raise UserError(f"expert_load.{name}: seen {value}, expected 1 or more steps")
        self.every_n_steps = every_n_steps
        self.dead_after_steps = dead_after_steps
        self._steps = 0
        self._windows: list[Tensor] = []
        self._ends: list[int] = []
        self._idle_LE: Tensor | None = None
        self._alarmed = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the counts, every so many batches."""
        assert isinstance(pl_module, PhaseModule)
        if pl_module.config.num_moe_layers == 0:
            return
        self._steps += 1
        if self._steps % self.every_n_steps == 0:
            self._take(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the rest and write the heatmap of the whole phase."""
        assert isinstance(pl_module, PhaseModule)
        if pl_module.config.num_moe_layers == 0 or is_trial(trainer):
            return
        self._take(trainer, pl_module)
        if trainer.is_global_zero and self._windows:
            self._write(Path(trainer.default_root_dir))

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {
            "steps": self._steps,
            "windows": list(self._windows),
            "ends": list(self._ends),
            "idle": self._idle_LE,
            "alarmed": self._alarmed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._steps, self._alarmed = state_dict["steps"], state_dict["alarmed"]
        self._windows, self._ends = list(state_dict["windows"]), list(state_dict["ends"])
        self._idle_LE = state_dict["idle"]

    def _take(self, trainer: L.Trainer, module: PhaseModule) -> None:
        """Sum the counts over ranks, clear them, draw them and look for dead experts. All ranks come here together."""
        shape = (module.config.num_moe_layers, module.config.num_experts)
        counted_LE = module.expert_load_LE
        if counted_LE is None:
            counted_LE = torch.zeros(shape, dtype=torch.int64, device=module.device)
        counts_LE = sum_over_ranks(counted_LE.to(torch.int64)).cpu()
        module.expert_load_LE = None
        if not counts_LE.any():
            return
        steps = self._steps - (self._ends[-1] if self._ends else 0)
        self._windows.append(counts_LE)
        self._ends.append(self._steps)
        self._merge()
        idle_LE = torch.zeros(shape, dtype=torch.int64) if self._idle_LE is None else self._idle_LE
        self._idle_LE = torch.where(counts_LE == 0, idle_LE + steps, torch.zeros_like(idle_LE))
        if not trainer.is_global_zero:
            return
        self._alarm()
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if boards and not is_trial(trainer):
            from qwen3_lit.callbacks.expert_load_plot import draw_heatmap, pixels  # matplotlib costs half a second

            image = pixels(draw_heatmap(counts_LE.numpy(), f"steps to {self._steps}"))
            for board in boards:
                board.experiment.add_image("router/expert_load", image, trainer.global_step, dataformats="HWC")

    def _merge(self) -> None:
        """Keep the file and the checkpoint small in a long run: join neighbours when there are too many windows."""
        if len(self._windows) > MAX_WINDOWS:
            pairs = range(0, len(self._windows), 2)
            self._windows = [torch.stack(self._windows[i : i + 2]).sum(0) for i in pairs]
            self._ends = [self._ends[min(i + 1, len(self._ends) - 1)] for i in pairs]

    def _alarm(self) -> None:
        assert self._idle_LE is not None
        dead_LE = self._idle_LE >= self.dead_after_steps
        if self._alarmed or not dead_LE.any():
            return
        self._alarmed = True
        layer, expert = (int(index) for index in dead_LE.nonzero()[0])
        log.warning(
            "%d of %d experts got no token for %d steps (the first: MoE layer %d, expert %d): raise the weight of the "
            "balance loss (model.init_args.balance), or lower the learning rate",
            int(dead_LE.sum()),
            dead_LE.numel(),
            self.dead_after_steps,
            layer,
            expert,
        )

    def _write(self, folder: Path) -> None:
        counts_WLE = torch.stack(self._windows).numpy()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, counts=counts_WLE, steps=np.array(self._ends))
        write_bytes(folder / COUNTS_FILE, buffer.getvalue())
        buffer = io.BytesIO()
        # The end of a phase is what the next one inherits; the first windows of a run are warm-up.
        recent = counts_WLE[len(counts_WLE) // 2 :].sum(0)
        begin = self._ends[len(counts_WLE) // 2 - 1] if len(counts_WLE) > 1 else 0
        from qwen3_lit.callbacks.expert_load_plot import draw_heatmap

        draw_heatmap(recent, f"steps {begin + 1} to {self._ends[-1]}").savefig(buffer, format="png")
        write_bytes(folder / HEATMAP_FILE, buffer.getvalue())
