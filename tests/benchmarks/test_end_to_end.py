"""Training steps and rollouts at a tiny size on a CPU, ours beside transformers."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "end_to_end.py"


def rows_of(table: Path, *arguments: str) -> list[dict[str, str]]:
    command = [sys.executable, str(SCRIPT), *arguments, "--device", "cpu", "--csv", str(table)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return list(csv.DictReader(table.open()))


@pytest.mark.slow
def test_training_steps(tmp_path: Path) -> None:
    contenders = ["--ours", "eager", "compile", "--opponents", "transformers", "transformers+liger"]
    rows = rows_of(tmp_path / "train.csv", "train", *contenders, "--shape", "2x24", "1x40", "--steps", "2")
    assert len(rows) == 8
    for row in rows:
        if row["implementation"] == "transformers+liger":
            assert row["status"] == "ok" or row["status"].startswith(("skipped", "failed"))  # its kernels need a GPU
            continue
        assert row["status"] == "ok", row["status"]
        documents, length = map(int, row["shape"].split("x"))
        tokens = documents * length
        assert float(row["tokens_per_s"]) == pytest.approx(1e3 * tokens / float(row["median_ms"]), rel=1e-3)
        assert float(row["tflops"]) > 0 and float(row["first_step_s"]) > 0
    by_name = {(row["implementation"], row["shape"]): row["flops"] for row in rows}
    assert by_name["transformers", "2x24"] == by_name["ours compile", "2x24"]


@pytest.mark.slow
def test_rollouts(tmp_path: Path) -> None:
    sizes = ["--prompts", "3", "--prompt-length", "5", "--new-tokens", "7"]
    rows = rows_of(tmp_path / "rollout.csv", "rollout", "--opponents", "transformers", *sizes)
    assert [row["implementation"] for row in rows] == ["transformers", "ours"]
    assert all(row["status"] == "ok" for row in rows), [row["status"] for row in rows]
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
