"""Training steps and rollouts at a tiny size on a CPU, ours beside transformers."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "end_to_end.py"


def rows_of(table: Path, *arguments: str, failing: bool = False) -> list[dict[str, str]]:
    command = [sys.executable, str(SCRIPT), *arguments, "--device", "cpu", "--csv", str(table)]
    environment = {**os.environ, "BENCHMARK_COMMIT": "of_a_test"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == int(failing), result.stdout + result.stderr
    return list(csv.DictReader(table.open()))


@pytest.mark.slow
def test_training_steps(tmp_path: Path) -> None:
    contenders = ["--ours", "eager", "compile", "--opponents", "torchtitan", "transformers", "transformers+liger"]
    rows = rows_of(tmp_path / "train.csv", "train", *contenders, "--shape", "2x24", "1x40", "--steps", "2")
    assert len(rows) == 10
    assert {row["implementation"] for row in rows} == {*contenders[-3:], "ours eager sdpa", "ours compile sdpa"}
    for row in rows:
        if row["implementation"] in ("torchtitan", "transformers+liger"):  # not installed; kernels that need a GPU
            assert row["status"] == "ok" or row["status"].startswith(("skipped", "failed"))
            continue
        assert row["status"] == "ok", row["status"]
        documents, length = map(int, row["shape"].split("x"))
        tokens = documents * length
        assert float(row["tokens_per_s"]) == pytest.approx(1e3 * tokens / float(row["median_ms"]), rel=1e-3)
        assert float(row["tflops"]) > 0 and float(row["first_step_s"]) > 0
    by_name = {(row["implementation"], row["shape"]): row["flops"] for row in rows}
    assert by_name["transformers", "2x24"] == by_name["ours compile sdpa", "2x24"]


@pytest.mark.slow
def test_rollouts(tmp_path: Path) -> None:
    sizes = ["--prompts", "3", "--prompt-length", "5", "--new-tokens", "7"]
    rows = rows_of(tmp_path / "rollout.csv", "rollout", "--opponents", "transformers", *sizes)
    assert [row["implementation"] for row in rows] == ["transformers", "ours sdpa"]
    assert all(row["status"] == "ok" for row in rows), [row["status"] for row in rows]
    for row in rows:
        assert float(row["tokens_per_s"]) == pytest.approx(1e3 * 3 * 7 / float(row["median_ms"]), rel=1e-3)
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])


@pytest.mark.slow
def test_an_attention_that_does_not_fit_is_a_row_with_the_reason(tmp_path: Path) -> None:
    sizes = ["--opponents", "--shape", "1x8", "--steps", "1", "--ours", "eager", "--attention", "triton", "sdpa"]
    triton, sdpa = rows_of(tmp_path / "train.csv", "train", *sizes, failing=True)
    assert (triton["implementation"], sdpa["implementation"]) == ("ours eager triton", "ours eager sdpa")
    assert triton["status"].startswith("skipped: ") and "cpu" in triton["status"] and sdpa["status"] == "ok"
