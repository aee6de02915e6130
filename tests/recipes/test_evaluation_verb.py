"""``qwen3-lit test`` of a trained phase gives the figures that its own report gave, for phases that generate too."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_lit.cli.main import main


@pytest.mark.parametrize("recipe", ["5_reasoning_rl", "reward_model"])
def test_the_figures_are_those_of_the_report(recipe: str, small: Any, tmp_path: Path) -> None:
    arguments = small.arguments(recipe, tmp_path)
    assert main(arguments) == 0
    assert main(["test", *arguments[1:]]) == 0
    reported = json.loads((tmp_path / "phase.json").read_text())["after"]
    (row,) = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    found = {name.removeprefix("test/"): value for name, value in row.items() if name.startswith("test/")}
    assert reported and found == pytest.approx(reported, rel=1e-5)
