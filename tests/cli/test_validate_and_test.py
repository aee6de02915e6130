"""``validate`` and ``test`` of a trained phase: their figures, and that the run's own curve stays as it was."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_lit.cli.main import main

PROSE = "the cat sat on the mat and one and two is three. "


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two steps of pre-training at laptop size, and the arguments to go on with that run."""
    root = tmp_path_factory.mktemp("trained")
    (root / "text").mkdir()
    for number in range(8):
        (root / "text" / f"{number}.txt").write_text(f"{number} {PROSE * 20}")
    assert main(["data", "tokenizer", f"{root}/text", "--out", f"{root}/tokenizer", "--vocab-size", "290"]) == 0
    prepare = ["data", "prepare", f"{root}/text", "--tokenizer", f"{root}/tokenizer", "--out", f"{root}/corpus"]
    assert main([*prepare, "--held-out-fraction", "0.5", "--workers", "1"]) == 0
    data = {
        "tokenizer_path": f"{root}/tokenizer",
        "sources": [{"path": f"{root}/corpus"}],
        "sequence_length": 64,
        "batch_tokens": 128,
        "val_tokens": 256,
        "val_min_tokens": 0,
    }
    typed = [
        f"--data.init_args.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in data.items()
    ]
    typed += ["--trainer.default_root_dir", f"{root}/run", "--model.init_args.schedule.warmup_steps=0"]
    typed += ["--model.init_args.config.hidden_size=16", "--model.init_args.config.num_hidden_layers=2"]
    typed += [
        "--trainer.accumulate_grad_batches=1",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=1.0",
    ]
    stack = ["-c", "1_pretrain_general", "-c", "size/nano", "-c", "hardware/cpu", "-c", "debug/smoke", *typed]
    assert main(["fit", *stack]) == 0
    return stack


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_curve_of_the_run_stays_and_the_figures_are_those_of_the_checkpoint(arguments: list[str]) -> None:
    run = Path(arguments[arguments.index("--trainer.default_root_dir") + 1])
    curve, phase = (run / "metrics.jsonl").read_text(), json.loads((run / "phase.json").read_text())
    boards = sorted((run / "tensorboard").iterdir())
    for verb in ("validate", "test", "validate"):
        assert main([verb, *arguments]) == 0
    assert (run / "metrics.jsonl").read_text() == curve
    assert sorted((run / "tensorboard").iterdir()) == boards
    trained = phase["after"]["held_out_loss"]
    assert [row["val/loss"] for row in rows(run / "validate.jsonl")] == pytest.approx([trained] * 2, rel=1e-5)
    assert [row["test/held_out_loss"] for row in rows(run / "test.jsonl")] == pytest.approx([trained], rel=1e-5)
    assert json.loads((run / "phase.json").read_text()) == phase
