"""What the model said, kept for reading."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from qwen3_lit.callbacks.run_report import RunReport
from qwen3_lit.callbacks.samples import Samples, markdown_table, read_samples, replace_stage


def rows(tmp_path: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["global_step"]) for row in read_samples(tmp_path / "phase" / "samples.jsonl")]


def test_training_and_evaluation_samples_are_kept_apart(fit: Any, tmp_path: Path) -> None:
    fit([Samples(every_n_steps=2), RunReport()])
    assert rows(tmp_path) == [("before", 0), ("train", 1), ("train", 3), ("after", 4)]


def test_a_resumed_run_has_no_row_twice(fit: Any, tmp_path: Path) -> None:
    fit([Samples(every_n_steps=1), RunReport()], max_steps=3)
    file = tmp_path / "phase" / "samples.jsonl"
    with file.open("a") as stream:  # a step after the checkpoint, and a line that a kill cut off
        stream.write('{"stage": "train", "global_step": 9}\n{"stage": "tr')
    fit([Samples(every_n_steps=1), RunReport()], max_steps=5)
    assert rows(tmp_path) == [
        ("before", 0),
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("train", 4),
        ("train", 5),
        ("after", 5),
    ]


def test_the_file_is_capped_and_keeps_the_evaluation(fit: Any, tmp_path: Path) -> None:
    fit([Samples(every_n_steps=1, max_rows=5), RunReport()], max_steps=12)
    found = rows(tmp_path)
    assert len(found) <= 6 and found[0] == ("before", 0) and found[-2:] == [("train", 12), ("after", 12)]


def test_table_reaches_tensorboard_escaped(fit: Any, tmp_path: Path) -> None:
    board = TensorBoardLogger(save_dir=str(tmp_path), name="", version="board")
    fit([Samples(every_n_steps=4)], logger=board)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board")).Reload()
    (text,) = events.Tensors("samples/text_summary")
    assert "3 &#124; 4<br>&lt;b>0" in text.tensor_proto.string_val[0].decode()


def test_table_has_a_column_for_each_reward() -> None:
    table = markdown_table(
        [
            {"prompt": "a", "completion": "x" * 50, "reward": 0.5, "rewards": {"format": 1.0}},
            {"prompt": "b", "completion": "y", "reward": 0.123456, "rewards": {"answer": None}},
        ],
        max_chars=10,
    )
    head, rule, first, second = table.splitlines()
    assert head == "| prompt | completion | reward | answer | format |" and rule.count("---") == 5
    assert first == "| a | xxxxx [...] xxxxx | 0.5 |  | 1 |" and second == "| b | y | 0.123 |  |  |"


def test_an_evaluation_done_again_replaces_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    replace_stage(file, [{"completion": "old"}], "after", 3)
    replace_stage(file, [{"completion": "new"}], "after", 3)
    assert [json.loads(line)["completion"] for line in file.read_text().splitlines()] == ["new"]


def test_phases_that_say_nothing_leave_no_file(tmp_path: Path) -> None:
    replace_stage(tmp_path / "samples.jsonl", [], "before", 0)
    assert not (tmp_path / "samples.jsonl").exists()


def test_bad_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="samples.every_n_steps: seen 0"):
        Samples(every_n_steps=0)
