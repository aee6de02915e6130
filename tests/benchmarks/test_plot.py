"""The figures are drawn from any results, however incomplete."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_figures_from_a_few_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plot, record = importlib.import_module("plot"), importlib.import_module("record")
    monkeypatch.setattr(record, "commit", lambda: "of_a_test")

    def row(implementation: str, milliseconds: float, **changes) -> object:
        values = {"op": "qk_norm_rope", "shape": "T=8192", "direction": "both", "gpu": "some GPU"}
        ceilings = {"copy_ceiling_gbps": 4000.0, "matmul_ceiling_tflops": 700.0, "tflops": 1e9 / milliseconds / 1e9}
        work = {"flops": 1e9, "bytes": 5e8, "median_ms": milliseconds, "implementation": implementation}
        return record.Row(**{**values, **ceilings, **work, **changes})

    rows = [
        row("triton", 0.2, date="2026-01-01"),
        row("triton", 0.1, date="2026-01-02"),
        row("reference", 0.9),
        row("liger", 0.3),
        row("liger", 0.1, status="failed: no reason", op="router_topk"),
        row("ours compile", 9.0, op="train_step_8_layers"),
    ]
    record.append(tmp_path / "some.csv", rows)
    assert plot.main([str(tmp_path / "some.csv"), "--out", str(tmp_path)]) == 0
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("roofline.png", "speedup.png"))
    kept = plot.latest(record.read([tmp_path / "some.csv"]))
    assert [r.median_ms for r in kept if r.implementation == "triton"] == [0.1]

    record.append(tmp_path / "some.csv", [row("triton", 0.2, gpu="another GPU")])
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "some.csv"), "--out", str(tmp_path)])
