"""Counts of routed rows: none lost, none counted twice, and an alarm for experts that nobody uses."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from qwen3_lit.callbacks.expert_load import MAX_WINDOWS, ExpertLoad
from qwen3_lit.callbacks.expert_load_plot import draw_heatmap, pixels
from qwen3_lit.errors import UserError


def test_every_routed_row_is_in_the_file_once(fit: Any, tmp_path: Path) -> None:
    module, _ = fit([ExpertLoad(every_n_steps=3)], max_steps=7)
    saved = np.load(tmp_path / "phase" / "expert_load.npz")
    assert saved["steps"].tolist() == [3, 6, 7]
    # 32 tokens, 2 experts each, in both layers
    assert saved["counts"].sum(-1).tolist() == [[192, 192], [192, 192], [64, 64]]
    assert module.expert_load_LE is None
    assert (tmp_path / "phase" / "expert_load.png").read_bytes().startswith(b"\x89PNG")


def test_counts_survive_a_resume(fit: Any, tmp_path: Path) -> None:
    fit([ExpertLoad(every_n_steps=2)], max_steps=4)
    fit([ExpertLoad(every_n_steps=2)], max_steps=6)
    saved = np.load(tmp_path / "phase" / "expert_load.npz")
    assert saved["steps"].tolist() == [2, 4, 6] and int(saved["counts"].sum()) == 6 * 32 * 2 * 2


def test_dense_models_are_left_alone(fit: Any, make_phase: Any, tmp_path: Path) -> None:
    fit([ExpertLoad(every_n_steps=1)], module=make_phase(num_experts=0))
    assert not (tmp_path / "phase" / "expert_load.png").exists()


def test_heatmaps_reach_tensorboard(fit: Any, tmp_path: Path) -> None:
    board = TensorBoardLogger(save_dir=str(tmp_path), name="", version="board")
    fit([ExpertLoad(every_n_steps=2)], logger=board)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("router/expert_load")] == [2, 4]


class _Trainer:
    is_global_zero, loggers, global_step = True, [], 1


def _feed(callback: ExpertLoad, module: Any, counts_LE: list[list[int]], steps: int) -> None:
    for _ in range(steps):
        module.expert_load_LE = torch.tensor(counts_LE)
        callback.on_train_batch_end(_Trainer(), module, None, None, 0)  # type: ignore[arg-type]


def test_a_dead_expert_is_reported_once(make_phase: Any, caplog: pytest.LogCaptureFixture) -> None:
    callback, module = ExpertLoad(every_n_steps=1, dead_after_steps=3), make_phase()
    with caplog.at_level(logging.WARNING, "qwen3_lit"):
        _feed(callback, module, [[4, 4, 0, 4], [4, 4, 4, 4]], 2)
        _feed(callback, module, [[4, 4, 1, 4], [4, 4, 4, 4]], 1)
        _feed(callback, module, [[4, 4, 0, 4], [4, 4, 4, 0]], 2)
        assert caplog.records == [], "an expert that was used in between is alive"
        _feed(callback, module, [[4, 4, 0, 4], [4, 4, 4, 0]], 5)
    assert len(caplog.records) == 1
    line = caplog.records[0].getMessage()
    assert line.startswith("2 of 8 experts got no token for 3 steps (the first: MoE layer 0, expert 2)")


def test_a_long_run_keeps_a_bounded_number_of_windows(make_phase: Any) -> None:
    callback, module = ExpertLoad(every_n_steps=1), make_phase()
    _feed(callback, module, [[1, 2, 3, 4], [4, 3, 2, 1]], 5 * MAX_WINDOWS)
    assert len(callback._windows) == len(callback._ends) <= MAX_WINDOWS
    assert callback._ends[-1] == 5 * MAX_WINDOWS and callback._ends == sorted(set(callback._ends))
    assert int(torch.stack(callback._windows).sum()) == 5 * MAX_WINDOWS * 20


def test_heatmap_says_what_is_dead() -> None:
    figure = draw_heatmap(np.array([[0, 4, 2, 2]]), "steps 1 to 2")
    assert "1 dead" in figure.axes[0].get_title(loc="left") and "2.0 x" in figure.axes[0].get_title(loc="left")
    image = pixels(figure)
    assert image.dtype == np.uint8 and image.shape[-1] == 3 and image.std() > 0


def test_bad_interval_is_refused() -> None:
    with pytest.raises(UserError, match="expert_load.every_n_steps: seen 0"):
        ExpertLoad(every_n_steps=0)
