"""The benchmarks run at a tiny size on a CPU: every operation is checked, timed and recorded, and what cannot run says
why."""

import csv
import importlib
import math
import os
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


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "run.py"), *arguments]
    environment = {**os.environ, "BENCHMARK_COMMIT": "of_a_test"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_every_operation_at_a_tiny_size(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    shapes = [word for shape in ("tiny", "tiny_chunked", "tiny_teacher") for word in ("--shape", shape)]
    tiny = ["--device", "cpu", "--seconds", "0.001", "--csv", str(table), *shapes]
    names = ["reference", "sdpa", "expert_loop", "composed_grouped_mm", "whole_logits", "liger", "triton", "ours"]
    names += ["gather_sdpa", "linear_float32", "linear_tf32", "linear_bfloat16_rounded", "flash_attention_4"]
    result = run_script(*tiny, *[word for name in names for word in ("--only", name)])
    assert result.returncode == 0, result.stdout + result.stderr
    rows = list(csv.DictReader(table.open()))
    done = [row for row in rows if row["status"] == "ok"]
    operations = {path.stem for path in (BENCHMARKS / "ops").glob("*.py")}
    assert {row["op"] for row in done} == operations
    for row in done:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) <= 1e-3 and float(row["copy_ceiling_gbps"]) > 0
        assert all(row[name] for name in ("date", "gpu", "torch", "implementation", "shape", "direction"))
        assert row["commit"] == "of_a_test"
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

    check = measure.Check(changed, "tiny", torch.device("cpu"))

    def status(name: str) -> str:
        (row,) = measure.measure(check, name, ceilings)
        assert row.median_ms is None and row.status == measure.verdict(check, name)
        return row.status

    assert status("off_by_a_percent").startswith("wrong: ") and "off by 1.00e-02" in status("off_by_a_percent")
    assert status("one_nan").startswith("wrong: q_rotated is off by nan")
    assert status("no_memory") == "out of memory: tried to allocate 1000 GiB"


def test_a_check_alone_times_nothing(benchmark_module, capsys) -> None:
    run: ModuleType = benchmark_module("run")
    asked = ["--device", "cpu", "--check-only", "router_topk", "--shape", "check_256_experts"]
    assert run.main([*asked, "--only", "reference"]) == 0
    out = capsys.readouterr().out
    assert "ok, error" in out and " ms " not in out
    assert run.main([*asked, "--only", "triton"]) == 1, "nothing was checked"
    assert "skipped: " in capsys.readouterr().out


def test_check_shapes_lie_in_every_launch_bucket(benchmark_module) -> None:
    shapes = benchmark_module("operation").operations()["grouped_experts"].shapes
    products = importlib.import_module("qwen3_kernels.grouped_experts_products_triton")
    reached = {products.bucket(shapes[n]["T"] * shapes[n]["K"], shapes[n]["E"]): n for n in shapes if "check" in n}
    assert reached == {name: f"check_{name}" for name in (*products.ROWS_PER_EXPERT, "plenty")}


def test_work_counts_what_has_to_move(benchmark_module) -> None:
    operations = benchmark_module("operation").operations()
    paged, topk = operations["paged_attention"], operations["router_topk"]
    tokens = paged.shapes["64x4096"]["B"] * 4096
    assert paged.work(paged.shapes["64x4096"], "forward").bytes == pytest.approx(tokens * 2 * 4 * 128 * 2, rel=3e-3)
    ragged = paged.make_inputs(paged.shapes["tiny"], torch.device("cpu"), torch.float32, torch.Generator())
    keys = int(ragged["context_lens"].sum())
    assert paged.work(paged.shapes["tiny"], "forward").flops == 4 * keys * 4 * 16
    work = [topk.work(topk.shapes["T=32768"], direction).bytes / 1e6 for direction in ("forward", "backward")]
    assert work == pytest.approx([16.8 + 4.2, 36.7], abs=0.1), "what the operation's docstring says"


def test_the_commit_is_that_of_this_tree_or_none(benchmark_module, monkeypatch, tmp_path: Path) -> None:
    record: ModuleType = benchmark_module("record")
    monkeypatch.delenv("BENCHMARK_COMMIT", raising=False)
    monkeypatch.setattr(record, "ROOT", tmp_path)

    def commit() -> str:
        record.commit.cache_clear()
        return record.commit()

    assert commit() == ""
    with pytest.raises(ValueError, match="set BENCHMARK_COMMIT"):
        record.append(tmp_path / "results.csv", [record.Row()])
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = commit()
    assert clean and "+" not in clean
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "a.csv").touch()
    assert commit() == clean, "results are no source"
    (tmp_path / "benchmarks" / "new.py").touch()
    assert commit() == clean + "+dirty"
    monkeypatch.setattr(record, "ROOT", tmp_path / "benchmarks")
    assert commit() == "", "a copy inside of another repository has no commit of its own"
    record.commit.cache_clear()


def test_a_csv_with_other_columns_is_not_written(benchmark_module, monkeypatch, tmp_path: Path) -> None:
    record: ModuleType = benchmark_module("record")
    monkeypatch.setattr(record, "commit", lambda: "of_a_test")
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
