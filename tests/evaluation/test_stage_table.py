"""The table of stages: the right figure, from the right file, under the right name."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_lit.errors import UserError
from qwen3_lit.evaluation.stage_table import EXPECTED, stage_table


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_finished_pipeline_has_every_figure(run_dir: Path) -> None:
    table = stage_table(run_dir)
    content = json.loads(json.dumps(table.as_json()))
    assert (content["total_seconds"], content["peak_rss_gb"], content["missing"]) == (666.0, 2.1, {})
    assert [phase["name"][0] for phase in content["phases"]] == list("123456789")
    assert [phase["name"] for phase in content["supporting_phases"]] == ["reward_model", "rl_from_off_policy"]
    for number, phase in enumerate(content["phases"], start=1):
        assert set(EXPECTED[number]) <= set(phase["metrics"]), phase["name"]
        assert phase["seconds"] > phase["train_seconds"], "the whole step, not the training alone"
    by_number = {int(phase["name"][0]): phase["metrics"] for phase in content["phases"]}
    assert by_number[3]["held_out_loss_4x_dca"] == 3.9
    assert by_number[4]["accuracy"] == 0.31 and by_number[4]["kept_fraction"] == 0.6
    assert by_number[4]["dropped"] == {"wrong_answer": 300, "repetition": 20}
    assert (by_number[5]["accuracy_before"], by_number[5]["accuracy_after"]) == (0.31, 0.58)
    assert by_number[7]["reward/title_before"] == 0.2


def test_cost_of_a_point_beside_reinforcement_learning_from_the_same_checkpoint(run_dir: Path) -> None:
    nine = stage_table(run_dir).phases[-1].metrics
    assert nine["seconds_per_point"] == pytest.approx(30 / 10)
    assert nine["rl_seconds_per_point"] == pytest.approx(60 / 2)
    assert nine["rl_accuracy_after"] == 0.42


def test_runs_from_another_checkpoint_are_no_comparison(run_dir: Path) -> None:
    edit(run_dir / "rl_from_off_policy" / "phase.json", init_from="elsewhere/hf")
    table = stage_table(run_dir)
    assert "rl_seconds_per_point" not in table.phases[-1].metrics
    assert table.missing == {"9_distill_on_policy": ["rl_seconds_per_point"]}


def test_an_accuracy_that_did_not_rise_has_no_cost(run_dir: Path) -> None:
    file = run_dir / "9_distill_on_policy" / "phase.json"
    edit(file, metrics={"accuracy_before": 0.4, "accuracy_after": 0.4, "seconds_per_point": 3.0})
    assert stage_table(run_dir).phases[-1].metrics["seconds_per_point"] is None


def test_costs_of_a_point_are_of_the_same_figure(run_dir: Path) -> None:
    both = {"accuracy_think_before": 0.4, "accuracy_think_after": 0.5}
    both |= {"accuracy_no_think_before": 0.2, "accuracy_no_think_after": 0.5}
    edit(run_dir / "9_distill_on_policy" / "phase.json", metrics=both)
    think = {"accuracy_think_before": 0.4, "accuracy_think_after": 0.42}
    edit(run_dir / "rl_from_off_policy" / "phase.json", metrics=think)
    nine = stage_table(run_dir).phases[-1].metrics
    assert (nine["accuracy_before"], nine["accuracy_after"]) == pytest.approx((0.3, 0.5)), "the mean of both modes"
    assert (nine["seconds_per_point"], nine["rl_seconds_per_point"]) == pytest.approx((3.0, 30.0)), "both in thinking"


def test_two_modes_are_not_mixed_into_one_accuracy(run_dir: Path) -> None:
    assert "accuracy" not in stage_table(run_dir).phases[5].metrics


def test_a_pipeline_under_way_shows_what_is_done(run_dir: Path) -> None:
    for name in ("7_general_rl", "8_distill_off_policy", "9_distill_on_policy", "rl_from_off_policy"):
        (run_dir / name / "phase.json").unlink()
    assert [phase.number for phase in stage_table(run_dir).phases] == [1, 2, 3, 4, 5, 6]


def test_a_single_phase_without_pipeline(run_dir: Path) -> None:
    table = stage_table(run_dir / "1_pretrain_general")
    assert [phase.name for phase in table.phases] == ["1_pretrain_general"]
    assert (table.total_seconds, table.peak_rss_gb) == (45.0, 1.0)


def test_phases_without_numbers_are_the_pipeline_where_no_other_is(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (run_dir / "reward_model").rename(tmp_path / "own" / "reward_model")
    assert [phase.name for phase in stage_table(tmp_path / "own").phases] == ["reward_model"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: root / "nowhere", "no such folder"),
        (lambda root: root / "data", "no finished phase"),
    ],
)
def test_folders_without_a_run(run_dir: Path, make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stage_table(make(run_dir))


@pytest.mark.parametrize(
    "text, message", [("{", "not valid JSON"), ("{}", "name is missing"), ("[]", "name is missing")]
)
def test_a_damaged_record_is_named(run_dir: Path, text: str, message: str) -> None:
    (run_dir / "2_pretrain_reasoning" / "phase.json").write_text(text)
    with pytest.raises(UserError, match=f"2_pretrain_reasoning/phase.json: {message}"):
        stage_table(run_dir)
