"""Every shipped recipe and variant is parsed, built and run for two steps, at laptop size, on real data in small.

The data come from the real verbs. What a recipe needs beyond that (weights, a judge, a reward model) is replaced by
settings on the command line, as a user would; its classes and losses stay. No shipped recipe asks a network service: a
judge behind a server (``JudgeReward.base_url``) is tested with the rewards.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qwen3_lit.cli.main import main
from qwen3_lit.cli.pipeline_file import read_pipeline
from qwen3_lit.cli.recipe_files import header, recipes_folder, shipped_names

FOLDER = recipes_folder()
CLASSES = [
    name
    for name in shipped_names()
    if yaml.safe_load((FOLDER / f"{name}.yaml").read_text()).get("model", {}).get("class_path")
]
"""Recipes: the files that name a module."""
OVERLAYS = [name for name in shipped_names() if name not in CLASSES and not name.startswith("pipelines/")]


@pytest.mark.parametrize("recipe", CLASSES)
def test_every_recipe_trains_two_steps(recipe: str, small: Any, tmp_path: Path) -> None:
    assert main(small.arguments(recipe, tmp_path)) == 0
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 2
    for name, value in checkpoint["state_dict"].items():
        assert torch.isfinite(value).all(), name
    assert (tmp_path / "config.yaml").is_file()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows and max(row["step"] for row in rows) <= 2


def test_general_rl_scores_by_rules_by_a_judge_and_by_a_reward_model(small: Any, tmp_path: Path) -> None:
    tasks = ["word_count", "judged_qa", "preference"]
    problems = [json.loads(line) for line in (small.root / "general.jsonl").read_text().splitlines()]
    wanted = [problem for problem in problems if problem["task"] in tasks]
    assert {problem["task"] for problem in wanted} == set(tasks)
    settings = {"data.init_args.tasks": tasks, "data.init_args.prompts_per_step": len(wanted), "trainer.max_steps": 1}
    assert main(small.arguments("7_general_rl", tmp_path, **settings)) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["rollout/reward/judge/mean"] == pytest.approx(0.7) and row["rollout/reward/judge/std"] == 0
    assert 0 < row["rollout/reward/reward_model/mean"] < 1 and row["rollout/reward/reward_model/std"] > 0
    assert 0 <= row["rollout/reward/instruction/mean"] <= 1
    applied = {name.split("/")[2] for name in row if name.startswith("rollout/reward/") and name.endswith("/mean")}
    assert not applied & {"tool_use", "grounded", "math_answer"}, "no problem of their tasks was asked"
    assert not [name for name in row if name.startswith("rollout/workers/") and row[name]], "no reward failed"


@pytest.mark.parametrize("recipe", ["1_pretrain_general", "4_cold_start_sft"])
def test_one_batch_is_learned_by_heart(recipe: str, small: Any, tmp_path: Path) -> None:
    settings = {"trainer.max_steps": 25, "trainer.val_check_interval": None}
    settings["model.init_args.optimizer.learning_rate"] = 0.01
    assert main(small.arguments(recipe, tmp_path, "debug/overfit_one_batch", **settings)) == 0
    losses = [json.loads(line).get("train/loss") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == 25 and losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_name_no_class(overlay: str) -> None:
    assert "class_path" not in (FOLDER / f"{overlay}.yaml").read_text()
    assert header(FOLDER / f"{overlay}.yaml").get("what")


@pytest.mark.parametrize("size", [name for name in OVERLAYS if name.startswith("size/")])
def test_sizes_set_dimensions_only(size: str) -> None:
    from qwen3_lit.model.config import POSITION_FIELDS, ModelConfig

    content = yaml.safe_load((FOLDER / f"{size}.yaml").read_text())
    assert list(content) == ["model"] and list(content["model"]["init_args"]) == ["config"]
    config = content["model"]["init_args"]["config"]
    assert not set(config) & set(POSITION_FIELDS)
    ModelConfig(**config)


@pytest.mark.parametrize(
    ("size", "billions", "active_billions"),
    [("0_6b", 0.596, 0.596), ("1_7b", 1.72, 1.72), ("4b", 4.02, 4.02), ("8b", 8.19, 8.19), ("14b", 14.77, 14.77)]
    + [("32b", 32.76, 32.76), ("30b_a3b", 30.53, 3.35), ("235b_a22b", 235.09, 22.19)],
)
def test_published_sizes_have_the_published_number_of_parameters(
    size: str, billions: float, active_billions: float
) -> None:
    from qwen3_lit.model.config import ModelConfig
    from qwen3_lit.model.cost import active_parameter_count, parameter_count

    config = ModelConfig(**yaml.safe_load((FOLDER / f"size/{size}.yaml").read_text())["model"]["init_args"]["config"])
    assert parameter_count(config) / 1e9 == pytest.approx(billions, abs=0.006)
    assert active_parameter_count(config) / 1e9 == pytest.approx(active_billions, abs=0.006)


@pytest.mark.parametrize("recipe", CLASSES)
def test_headers_say_what_a_user_wants_to_know(recipe: str) -> None:
    fields = header(FOLDER / f"{recipe}.yaml")
    for key in ("what", "phase", "module", "needs", "run", "expect", "next", "source"):
        assert fields.get(key), f"{recipe}: the header lacks {key}"
    assert recipe in fields["run"]


@pytest.mark.parametrize("recipe", CLASSES)
def test_a_recipe_that_evaluates_both_modes_asks_by_flags(recipe: str) -> None:
    init_args = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())["model"]["init_args"]
    evaluation = init_args.get("evaluation") or {}
    assert len(evaluation.get("modes", ())) < 2 or evaluation["mode_switch"] == "soft"


@pytest.mark.parametrize("name", [name for name in shipped_names() if name.startswith("pipelines/")])
def test_pipelines_read_and_every_step_gets_what_an_earlier_one_wrote(name: str) -> None:
    pipeline = read_pipeline(name)
    written: set[str] = set()
    for step in pipeline.steps:
        for argument in step.arguments:
            for path in _paths_inside(argument, str(pipeline.run_dir)):
                own = any(path == out or path.startswith(out + "/") for out in step.outputs)
                earlier = any(path == out or path.startswith(out + "/") for out in written)
                assert own or earlier, f"{name}: step {step.name} reads {path}, which no earlier step writes"
        written |= set(step.outputs)


def _paths_inside(argument: str, run_dir: str) -> list[str]:
    import re

    return re.findall(re.escape(run_dir) + r"/[\w./-]+", argument)


@pytest.mark.parametrize("name", [name for name in shipped_names() if name.startswith("pipelines/")])
def test_the_commands_of_a_pipeline_are_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse
    import importlib

    from qwen3_lit.cli.main import LIGHTNING_VERBS, find_verb

    for step in read_pipeline(name).steps:
        verb, arguments = find_verb(step.arguments)
        if verb.name in LIGHTNING_VERBS:
            with pytest.raises(SystemExit) as stop:
                code = main([verb.name, *arguments, "--print_config"])
                pytest.fail(f"{step.name}: exit code {code}: {capsys.readouterr().err}")
            assert stop.value.code in (0, None), step.name
        else:
            module = importlib.import_module(verb.module)
            parser = argparse.ArgumentParser(prog=f"{step.name}: {verb.name}")
            module.add_arguments(parser)
            parser.parse_args(arguments)
