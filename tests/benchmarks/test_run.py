"""The benchmarks run at a tiny size on a CPU: every operation is checked, timed and recorded, and what cannot run says
why."""

import csv
import importlib
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch):
    """A module of benchmarks/, which is a folder of scripts and no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run_script(*arguments: str, script: str = "run.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_every_operation_at_a_tiny_size(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    tiny = ["--device", "cpu", "--seconds", "0.001", "--csv", str(table), "--shape", "tiny", "--shape", "tiny_chunked"]
    names = ["reference", "sdpa", "expert_loop", "composed_grouped_mm", "whole_logits", "liger", "triton"]
    result = run_script(*tiny, *[word for name in names for word in ("--only", name)])
    assert result.returncode == 0, result.stdout + result.stderr
    rows = list(csv.DictReader(table.open()))
    done = [row for row in rows if row["status"] == "ok"]
    operations = {path.stem for path in (BENCHMARKS / "ops").glob("*.py")}
    assert {row["op"] for row in done} == operations
    for row in done:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) <= 1e-3 and float(row["copy_ceiling_gbps"]) > 0
        assert all(row[name] for name in ("date", "gpu", "torch", "commit", "implementation", "shape", "direction"))
        assert float(row["gbps"]) * float(row["median_ms"]) == pytest.approx(float(row["bytes"]) / 1e6, rel=1e-3)
    skipped = {row["implementation"]: row["status"] for row in rows if row["status"] != "ok"}
    assert all(status.startswith("skipped: ") for status in skipped.values()), skipped

    before = len(rows)
    result = run_script(*tiny, "router_topk", "--only", "reference", "--direction", "both")
    assert result.returncode == 0, result.stderr
    assert len(list(csv.DictReader(table.open()))) == before + 1, "a second run appends"


def test_a_wrong_contender_is_not_timed_and_fails_the_run(benchmark_module) -> None:
    operation: ModuleType = benchmark_module("operation")
    measure: ModuleType = benchmark_module("measure")
    timing: ModuleType = benchmark_module("timing")
    scale = operation.operations()["qk_norm_rope"]

    def off_by_a_percent(inputs):
        return {name: 1.01 * value for name, value in scale.truth(inputs).items()}

    def one_nan(inputs):
        outputs = scale.truth(inputs)
        return outputs | {"q_rotated": outputs["q_rotated"] + torch.full((), math.nan)}

    def no_memory(inputs):
        raise torch.OutOfMemoryError("tried to allocate 1000 GiB")

    contenders = {
        call.__name__: operation.Contender(lambda call=call: call) for call in (off_by_a_percent, one_nan, no_memory)
    }
    changed = operation.Operation(**{**vars(scale), "contenders": contenders})
    ceilings = timing.Ceilings(1.0, 1.0)

    def status(name: str) -> str:
        (row,) = measure.measure(changed, "tiny", name, ceilings, torch.device("cpu"))
        assert row.median_ms is None
        return row.status

    assert status("off_by_a_percent").startswith("wrong: ") and "off by 1.00e-02" in status("off_by_a_percent")
    assert status("one_nan").startswith("wrong: q_rotated is off by nan")
    assert status("no_memory") == "out of memory: tried to allocate 1000 GiB"


def test_a_csv_with_other_columns_is_not_written(benchmark_module, tmp_path: Path) -> None:
    record: ModuleType = benchmark_module("record")
    path = tmp_path / "old.csv"
    path.write_text("op,time\n")
    with pytest.raises(ValueError, match="move the file away"):
        record.append(path, [record.Row()])
    path.unlink()
    record.append(path, [record.Row(op="a", median_ms=1.5)])
    assert record.read([path]) == [record.Row(op="a", median_ms=1.5)]


def test_list_names_everything() -> None:
    result = run_script("--list", "grouped_experts")
    assert result.returncode == 0 and "shape decode_8" in result.stdout and "--only liger" in result.stdout
    assert run_script("no_such_operation").returncode == 2
