"""Every shipped recipe and variant is parsed, built and run for two steps, at laptop size, on real data in small.

The data come from the real verbs, the weights from a real phase, once per session. What a recipe needs beyond that
(folders, a judge) is replaced by overlays on the command line, as a user would; its classes and losses stay.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

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
SMALL = ["-c", "size/nano", "-c", "hardware/cpu", "-c", "debug/smoke"]


@dataclass(frozen=True)
class Small:
    """A tokenizer, a corpus, problems and conversations, and weights to start from."""

    root: Path

    def __truediv__(self, name: str) -> str:
        return str(self.root / name)


def _run(*argv: str) -> None:
    assert main(list(argv)) == 0, argv


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    root = tmp_path_factory.mktemp("small")
    made = Small(root)
    (root / "text").mkdir()
    library = Path(os.__file__).parent
    for name in ("argparse", "tarfile", "typing", "inspect"):
        (root / "text" / f"{name}.py").write_bytes((library / f"{name}.py").read_bytes())
    _run("data", "tokenizer", made / "text", "--out", made / "tokenizer", "--vocab-size", "384")
    _run(
        *("data", "prepare", made / "text", "--tokenizer", made / "tokenizer", "--out", made / "corpus"),
        *("--max-tokens", "2048", "--held-out-fraction", "0.2", "--workers", "1"),
    )
    tasks = ("--tasks", "chain_sum", "--option", "style=short")
    synthesize = ("data", "synthesize")
    _run(*synthesize, "problems", "--out", made / "train.jsonl", "--count", "40", *tasks)
    _run(*synthesize, "problems", "--out", made / "held_out.jsonl", "--count", "4", "--split", "held_out", *tasks)
    _run(*synthesize, "reasoning_candidates", "--out", made / "candidates.jsonl", "--count", "60", *tasks)
    _run("data", "curate", made / "candidates.jsonl", "--out", made / "thinking.jsonl")
    _run(*synthesize, "dialogs", "--out", made / "dialogs.jsonl", "--count", "60")
    _run(*synthesize, "general_problems", "--out", made / "general.jsonl", "--count", "60")
    _run(*synthesize, "preferences", "--out", made / "preferences.jsonl", "--count", "60")
    _write_weights(made)
    return made


def _write_weights(made: Small) -> None:
    from qwen3_lit.model.config import ModelConfig
    from qwen3_lit.model.hf_checkpoint import save_hf
    from qwen3_lit.model.transformer import Qwen3

    torch.manual_seed(0)
    config = ModelConfig(**yaml.safe_load((FOLDER / "size/nano.yaml").read_text())["model"]["init_args"]["config"])
    save_hf(Qwen3(config), config, made / "hf", tokenizer_dir=made / "tokenizer")


def _settings(recipe: str, small: Small, folder: Path) -> list[str]:
    """What a user sets to run the recipe on the small data."""
    content = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())
    module, data = content["model"]["class_path"], content["data"]["class_path"]
    model = content["model"]["init_args"]
    values: dict[str, object] = {
        "trainer.default_root_dir": str(folder),
        "data.init_args.tokenizer_path": small / "tokenizer",
        "model.init_args.config.max_position_embeddings": 1024,
        "model.init_args.schedule.warmup_steps": 0,
    }
    if "init_from" in model:
        values["model.init_args.init_from"] = small / "hf"
    if "teacher" in model:
        values["model.init_args.teacher"] = small / "hf"
    if data == "PretrainData":
        values |= {
            "data.init_args.sources": [{"path": small / "corpus"}],
            "data.init_args.sequence_length": 256,
            "data.init_args.batch_tokens": 512,
            "data.init_args.val_tokens": 512,
            "data.init_args.val_min_tokens": 0,
            "trainer.accumulate_grad_batches": 2,
            "trainer.val_check_interval": 2,
        }
        if "length_mix" in content["data"]["init_args"]:
            values["data.init_args.length_mix"] = [{"min_tokens": 0, "max_tokens": None, "fraction": 1.0}]
            values["model.init_args.extrapolation_chunks"] = {"chunk_size": 64, "local_size": 16}
    else:
        values["data.init_args.batch_tokens" if data != "PromptData" else "data.init_args.prompts_per_step"] = (
            1024 if data != "PromptData" else 2
        )
    if data == "ConversationData":
        values["data.init_args.paths"] = [small / "thinking.jsonl"]
    if data == "FusionData":
        values["data.init_args.thinking_paths"] = [small / "thinking.jsonl"]
        values["data.init_args.non_thinking_paths"] = [small / "dialogs.jsonl"]
    if data == "PreferenceData":
        values["data.init_args.paths"] = [small / "preferences.jsonl"]
    if data == "PromptData":
        values["data.init_args.paths"] = [small / ("general.jsonl" if recipe.startswith("7") else "train.jsonl")]
        values["data.init_args.held_out_path"] = small / "held_out.jsonl"
        values["model.init_args.sampling"] = {"max_new_tokens": 8}
        values["model.init_args.engine"] = {"max_batch_size": 16, "max_cached_tokens": 16384}
    if "group_size" in model:
        values["model.init_args.group_size"] = 2
        values["model.init_args.num_minibatches"] = 1
    if "samples_per_prompt" in model:
        values["model.init_args.samples_per_prompt"] = 2
    if "reward_workers" in model:
        values["model.init_args.reward_workers"] = {"num_workers": 1, "deadline_seconds": 10.0}
    if "evaluation" in model:
        values["model.init_args.evaluation"] = {
            "problems": [small / "held_out.jsonl"],
            "limit": 2,
            "sampling": {"max_new_tokens": 8},
        }
    if any(reward["class_path"] in ("JudgeReward", "RewardModelReward") for reward in model.get("rewards", [])):
        kept = [r for r in model["rewards"] if r["class_path"] not in ("JudgeReward", "RewardModelReward")]
        values["model.init_args.rewards"] = kept
    assert module in header(FOLDER / f"{recipe}.yaml")["module"]
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


@pytest.mark.parametrize("recipe", CLASSES)
def test_every_recipe_trains_two_steps(recipe: str, small: Small, tmp_path: Path) -> None:
    _run("fit", "-c", recipe, *SMALL, *_settings(recipe, small, tmp_path))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 2
    for name, value in checkpoint["state_dict"].items():
        assert torch.isfinite(value).all(), name
    assert (tmp_path / "config.yaml").is_file()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows and max(row["step"] for row in rows) <= 2


def test_a_run_that_was_stopped_ends_like_one_that_was_not(small: Small, tmp_path: Path) -> None:
    command = ["fit", "-c", "1_pretrain_general", *SMALL, "--model.init_args.schedule.total_steps=4"]
    finals = []
    for name, stops in (("whole", (4,)), ("stopped", (1, 3, 4))):
        folder = tmp_path / name
        for stop in stops:
            _run(*command, *_settings("1_pretrain_general", small, folder), f"--trainer.max_steps={stop}")
        kept = [path.name for path in (folder / "checkpoints").glob("step=*.ckpt")]
        assert kept == ["step=00000004.ckpt"], "older checkpoints of a run are removed, also after a resume"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
        finals.append((torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"], losses))
    (whole, whole_losses), (stopped, stopped_losses) = finals
    assert whole.keys() == stopped.keys()
    for name in whole:
        assert torch.equal(whole[name], stopped[name]), name
    assert whole_losses == stopped_losses and len(whole_losses) == 4


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
