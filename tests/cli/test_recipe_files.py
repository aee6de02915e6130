"""Recipe files as text: names, lines, stacking rules, ls and cp."""

from pathlib import Path

import pytest

from qwen3_lit.cli import recipe_copy, recipe_files
from qwen3_lit.cli.class_index import class_index, nearest_class
from qwen3_lit.cli.main import main
from qwen3_lit.cli.recipe_files import check_stack, class_names, read_settings, resolve_recipe, split_arguments
from qwen3_lit.errors import UserError

RECIPE = "model:\n  class_path: GRPOModule\n  init_args:\n    group_size: 8\ndata:\n  class_path: PromptData\n"
OVERLAY = "model:\n  init_args:\n    group_size: 4\n"


def _write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_short_names_paths_and_the_nearest_name(tmp_path: Path) -> None:
    for name in ("size/nano", "recipes/size/nano.yaml", "size/nano.yaml"):
        assert resolve_recipe(name).resolve() == recipes_file("size/nano.yaml")
    own = _write(tmp_path, "own.yaml", RECIPE)
    assert resolve_recipe(str(own)) == own
    with pytest.raises(UserError, match="did you mean .*size/nano"):
        resolve_recipe("size/nanno")


def recipes_file(name: str) -> Path:
    return (recipe_files.recipes_folder() / name).resolve()


def test_settings_know_their_lines(tmp_path: Path) -> None:
    settings = {s.path: s for s in read_settings(_write(tmp_path, "r.yaml", RECIPE))}
    group = settings[("model", "init_args", "group_size")]
    assert (group.line, group.value) == (4, "8")
    assert group.where == f"{tmp_path / 'r.yaml'}:4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", r"r.yaml:1: not valid YAML|r.yaml:2: not valid YAML"),
        ("", "empty"),
        ("- a\n", "r.yaml:1: expected keys"),
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: key a is set twice, first in line 1"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(_write(tmp_path, "r.yaml", text))


def test_two_recipes_cannot_be_stacked(tmp_path: Path) -> None:
    first = read_settings(_write(tmp_path, "a.yaml", RECIPE))
    second = read_settings(_write(tmp_path, "b.yaml", RECIPE.replace("GRPOModule", "PretrainModule")))
    with pytest.raises(UserError, match=r"b.yaml:2: model is set to Pretrain.*a.yaml:2 set it to GRPO"):
        check_stack([first, second, []])
    check_stack([first, first, []])


LOSS = "model:\n  class_path: GRPOModule\n  init_args:\n    policy_loss:\n      class_path: GRPOLoss\n"


@pytest.mark.parametrize("value", ["GSPOLoss", "my_package.MyLoss", "{class_path: GSPOLoss}"])
@pytest.mark.parametrize("key", ["model.init_args.policy_loss", "model.policy_loss"])
def test_a_bare_class_name_counts_as_class_path(tmp_path: Path, value: str, key: str) -> None:
    recipe = read_settings(_write(tmp_path, "a.yaml", LOSS))
    overlay = f"model:\n  init_args:\n    policy_loss: {value}\n"
    _, _, typed = split_arguments([f"--{key}={value}"])
    for stack in (read_settings(_write(tmp_path, "o.yaml", overlay)), typed):
        with pytest.raises(UserError, match=r"policy_loss is set to .*Loss, but .*a.yaml:5 set it to GRPOLoss"):
            check_stack([recipe, stack])


def test_bare_names_of_ours_are_known_without_a_class_path_before_them(tmp_path: Path) -> None:
    recipe = read_settings(_write(tmp_path, "a.yaml", LOSS.replace("\n      class_path: GRPOLoss", " GRPOLoss")))
    _, _, typed = split_arguments(["--model.init_args.policy_loss=GSPOLoss"])
    with pytest.raises(UserError, match=r"command line: model.policy_loss is set to GSPOLoss, but .*a.yaml:4"):
        check_stack([recipe, typed])


@pytest.mark.parametrize("value", ["null", "GRPOLoss", "qwen3_lit.losses.policy_gradient.GRPOLoss", "false", "0.5"])
def test_values_that_mix_no_classes_are_let_through(tmp_path: Path, value: str) -> None:
    recipe = read_settings(_write(tmp_path, "a.yaml", LOSS))
    check_stack([recipe, split_arguments([f"--model.init_args.policy_loss={value}"])[2]])


def test_null_forgets_a_class(tmp_path: Path) -> None:
    recipe = read_settings(_write(tmp_path, "a.yaml", LOSS))
    clear = read_settings(_write(tmp_path, "o.yaml", "model:\n  init_args:\n    policy_loss: null\n"))
    check_stack([recipe, clear, split_arguments(["--model.init_args.policy_loss=GSPOLoss"])[2]])


def test_an_overlay_before_its_recipe_is_refused_with_the_fix(tmp_path: Path) -> None:
    recipe = read_settings(_write(tmp_path, "a.yaml", RECIPE))
    overlay = read_settings(_write(tmp_path, "o.yaml", OVERLAY))
    check_stack([recipe, overlay])
    with pytest.raises(UserError, match=r"write -c .*a.yaml before -c .*o.yaml"):
        check_stack([overlay, recipe])


def test_the_command_line_counts_as_the_last_file(tmp_path: Path) -> None:
    recipe = _write(tmp_path, "a.yaml", RECIPE)
    files, arguments, typed = split_arguments(["-c", str(recipe), "--model", "PretrainModule", "--trainer.max_steps=3"])
    assert files == [recipe]
    assert arguments == ["-c", str(recipe), "--model", "PretrainModule", "--trainer.max_steps=3"]
    with pytest.raises(UserError, match="command line: model is set to PretrainModule"):
        check_stack([read_settings(recipe), typed])


def test_items_of_a_list_may_name_other_classes(tmp_path: Path) -> None:
    first = read_settings(_write(tmp_path, "a.yaml", RECIPE + "rewards:\n  - class_path: A\n"))
    second = read_settings(_write(tmp_path, "b.yaml", "rewards:\n  - class_path: B\n"))
    check_stack([first, second])


def test_class_names_come_from_files_and_from_values_on_the_command_line(tmp_path: Path) -> None:
    recipe = read_settings(_write(tmp_path, "a.yaml", RECIPE))
    _, _, typed = split_arguments(['--model.init_args.rewards=[{"class_path": "FormatReward"}]', "--model.help", "X"])
    assert class_names([*recipe, *typed]) == ["GRPOModule", "PromptData", "FormatReward", "X"]


def test_the_class_index_finds_our_classes() -> None:
    assert class_index()["GRPOModule"] == ("qwen3_lit.modules.grpo",)
    assert nearest_class("GRPOModul") == "GRPOModule"


def test_cp_copies_and_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mine.yaml"
    assert main(["cp", "5_reasoning_rl", str(target)]) == 0
    assert target.read_bytes() == recipes_file("5_reasoning_rl.yaml").read_bytes()
    assert main(["cp", "5_reasoning_rl", str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*")), "a half-written file is left"
    assert recipe_copy.HELP


def test_ls_filters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "gspo"]) == 0
    out = capsys.readouterr().out
    assert "variants/gspo" in out and "1_pretrain_general  " not in out
    assert main(["ls", "no such thing"]) == 1
