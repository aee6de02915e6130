"""Curves from metrics.jsonl."""

from pathlib import Path

import numpy as np

from qwen3_lit.evaluation.metrics_file import Curve, read_curves


def test_rows_become_curves_and_damage_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 0, "seconds": 1, "a": 1.5}\n{"step": 2, "seconds": 2, "a": null, "b": 3}\n{"step": 3, "a"'
    )
    curves = read_curves(file)
    assert set(curves) == {"a", "b"}
    assert curves["a"].steps.tolist() == [0] and curves["b"].values.tolist() == [3.0]
    assert read_curves(tmp_path / "nothing") == {}


def test_smoothing_is_the_mean_of_the_last_points() -> None:
    curve = Curve(np.arange(4), np.array([1.0, 3.0, 5.0, 9.0]))
    assert curve.smoothed(2).tolist() == [1.0, 2.0, 4.0, 7.0]
