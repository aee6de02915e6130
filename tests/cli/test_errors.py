"""What a user sees who made a mistake: one line with file, line, key, what was seen and the fix."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_lit.cli.config_errors import explain, explain_value_error, locate
from qwen3_lit.cli.main import main
from qwen3_lit.cli.recipe_files import Setting, recipes_folder
from qwen3_lit.data.tokenizer import train_tokenizer


def _overlay(tmp_path: Path, text: str) -> str:
    path = tmp_path / "overlay.yaml"
    path.write_text(text)
    return str(path)


def _fit(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    recipe = str(recipes_folder() / "1_pretrain_general.yaml")
    code = main(["fit", "-c", recipe, "-c", "size/nano", "-c", "hardware/cpu", *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qwen3-lit fit:")]
    assert code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle:\n  a: 1\n", ["overlay.yaml:1", "unknown key 'modle'", "did you mean 'model'?"]),
        ("trainer:\n  max_stepz: 1\n", ["overlay.yaml:2", "unknown key 'max_stepz'", "'max_steps'"]),
        ("trainer:\n  max_steps: many\n", ["overlay.yaml:2", "trainer.max_steps", "seen 'many'", "expected int"]),
        (
            "model:\n  init_args:\n    optimiser:\n      learning_rate: 1.0\n",
            ["overlay.yaml:3", "unknown key 'optimiser'", "did you mean 'optimizer'?"],
        ),
        (
            "model:\n  init_args:\n    optimiser: {}\n",
            ["overlay.yaml:3", "model.init_args.optimiser is an empty mapping", "remove it"],
        ),
        (
            "model:\n  init_args:\n    config:\n      hidden_sise: 64\n",
            ["overlay.yaml:4", "unknown key 'hidden_sise'", "did you mean 'hidden_size'?"],
        ),
        (
            "model:\n  init_args:\n    optimizer:\n      learning_rat: 1.0\n",
            ["overlay.yaml:4", "unknown key 'learning_rat'", "did you mean 'learning_rate'?"],
        ),
        (
            "model:\n  init_args:\n    config:\n      hidden_size: wide\n",
            ["overlay.yaml:4", "hidden_size", "seen 'wide'", "expected int"],
        ),
        (
            "model:\n  init_args:\n    optimizer:\n      learning_rate: -0.1\n",
            ["overlay.yaml:4", "learning_rate", "-0.1"],
        ),
        (
            "model:\n  init_args:\n    config:\n      num_key_value_heads: 3\n",
            ["overlay.yaml:4", "num_key_value_heads", "3", "divisor"],
        ),
        (
            "model:\n  init_args:\n    balance:\n      init_args:\n        wait: 1.0\n",
            ["overlay.yaml:5", "unknown key 'wait'", "'weight'"],
        ),
    ],
)
def test_one_line_says_where_and_what(
    tmp_path: Path, text: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = _fit(capsys, "-c", _overlay(tmp_path, text))
    for part in expected:
        assert part in line, line


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["one two three"] * 20, 285, folder)
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer: {max_steps: -5}\n", ["overlay.yaml:1: ", "max_steps"]),
        (
            "model:\n  init_args:\n    init_from: gone/hf\n",
            ["overlay.yaml:3: model.init_args.init_from: gone/hf", "config.json"],
        ),
        (
            "data:\n  init_args:\n    sources: [{path: gone}]\n",
            ["overlay.yaml:3: data.init_args.sources.0.path: gone: does not exist"],
        ),
    ],
)
def test_what_shows_when_the_run_is_set_up_names_its_line_and_leaves_nothing(
    tmp_path: Path, tokenizer: Path, text: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"data: {{init_args: {{tokenizer_path: {tokenizer}}}}}\ntrainer: {{default_root_dir: {tmp_path}/run}}\n"
    (tmp_path / "own.yaml").write_text(own)
    line = _fit(capsys, "-c", str(tmp_path / "own.yaml"), "-c", _overlay(tmp_path, text))
    for part in expected:
        assert part in line, line
    assert not (tmp_path / "run").exists()


def test_held_out_problems_that_are_missing_show_before_anything_runs(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (tmp_path / "sft.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    overlay = f"""
model:
  init_args:
    init_from: null
    evaluation: {{problems: [{tmp_path}/gone.jsonl]}}
data: {{init_args: {{tokenizer_path: {tokenizer}, paths: [{tmp_path}/sft.jsonl], held_out_fraction: 0.0}}}}
trainer: {{default_root_dir: {tmp_path}/run, val_check_interval: null}}
"""
    recipe = str(recipes_folder() / "4_cold_start_sft.yaml")
    arguments = ["-c", recipe, "-c", "size/nano", "-c", "hardware/cpu", "-c", _overlay(tmp_path, overlay)]
    assert main(["fit", *arguments]) == 2
    err = capsys.readouterr().err
    assert f"overlay.yaml:5: model.init_args.evaluation.problems.0: {tmp_path}/gone.jsonl: " in err
    assert "evaluating before the phase" not in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = _fit(capsys, "--model.init_args.optimizer.learning_rate=-1")
    assert "command line" in line and "learning_rate" in line and "-1" in line


def test_an_unknown_class_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = (recipes_folder() / "1_pretrain_general.yaml").read_text()
    recipe = recipe.replace("class_path: PretrainModule", "class_path: PretranModule")
    path = tmp_path / "own.yaml"
    path.write_text(recipe)
    assert main(["fit", "-c", str(path)]) == 2
    err = capsys.readouterr().err
    assert "own.yaml:" in err and "'PretranModule'" in err and "did you mean 'PretrainModule'?" in err


def test_a_class_in_the_current_folder_is_found_and_a_missing_module_is_not_taken_for_a_misspelt_class(
    tmp_path: Path,
) -> None:
    recipe = (recipes_folder() / "5_reasoning_rl.yaml").read_text()
    (tmp_path / "own.yaml").write_text(recipe.replace("class_path: GRPOLoss", "class_path: my_package.MyLoss"))
    # As the console script does: the first entry of sys.path is the script's folder.
    code = "import sys; sys.path[0] = '/usr/bin'; from qwen3_lit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "fit", "-c", "own.yaml", "--print_config"]
    missing = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert missing.returncode == 2
    assert f"model.policy_loss: No module named 'my_package'; expected it in {tmp_path}" in missing.stderr
    assert "own.yaml:" in missing.stderr and "did you mean" not in missing.stderr
    (tmp_path / "my_package.py").write_text(
        "from qwen3_lit.losses.policy_gradient import GRPOLoss\nclass MyLoss(GRPOLoss):\n    pass\n"
    )
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0 and "class_path: my_package.MyLoss" in found.stdout, found.stderr


def test_fit_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    assert "-c RECIPE" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _fit(capsys, f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={tmp_path}/gone.ckpt")
    assert "gone.ckpt: no such checkpoint" in line and "init_from" in line


SETTINGS = [
    Setting(("model", "init_args", "optimizer", "learning_rate"), "a.yaml", 3, "1.0"),
    Setting(("model", "init_args", "rewards", "0", "class_path"), "a.yaml", 5, "X"),
    Setting(("model", "init_args", "optimizer", "learning_rate"), "b.yaml", 7, "2.0"),
]


def test_the_last_file_that_sets_a_key_is_named() -> None:
    found = locate(["model", "optimizer", "learning_rate"], SETTINGS)
    assert found is not None and found.where == "b.yaml:7"
    assert locate(["nothing"], SETTINGS) is None


def test_value_errors_inside_union_noise() -> None:
    noise = "Does not validate against any\nErrors:\n  - learning_rate: seen -1\n  - Expected a None"
    assert explain_value_error(noise, SETTINGS) == "b.yaml:7: learning_rate: seen -1"


def test_missing_arguments_are_named() -> None:
    message = (
        "Parser key \"model\":\n  Errors:\n    - Problem with given class_path 'x.Y':\n"
        "        the following arguments are required: factor\n"
    )
    line = explain(message, SETTINGS, lambda owner, group: [], lambda name: None)
    assert line.endswith("model.factor is not set; it is required")
