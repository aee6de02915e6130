"""Pipeline files: phases in order, with variables filled in and each step turned into one command line.

A file holds ``run_dir``, optional ``vars`` and ``steps``. A step is ``{name, command: [data, prepare, ...]}`` or
``{name, recipe, overlays, set}``; ``outputs`` names what a command writes, so that a changed step starts clean and
later steps that name it wait for it. ``beside: true`` lets a step run next to the others.
``${run_dir}`` and ``${name_of_a_variable}`` are replaced in every text; a variable that is a list adds all its words to
a command.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwen3_lit.cli.recipe_files import Setting, read_settings, resolve_recipe
from qwen3_lit.errors import UserError

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_STEP_KEYS = {"name", "command", "recipe", "overlays", "set", "outputs", "verb", "beside"}
_FILE_KEYS = {"run_dir", "vars", "steps"}


@dataclass(frozen=True)
class Step:
    """One command of a pipeline, ready to run."""

    name: str
    arguments: tuple[str, ...]
    """What follows ``qwen3-lit``."""
    outputs: tuple[str, ...]
    """Files and folders that the step alone writes; removed before a changed step runs again."""
    sources: tuple[Path, ...] = field(default=())
    """Recipe files whose text decides what the step does."""
    beside: bool = False
    """Runs next to the steps in order, as early as it can."""

    def needs(self, earlier: "Step") -> bool:
        """Whether an argument names an output of the other step, or something in it."""
        named = [re.compile(re.escape(output) + r"(?![\w.-])") for output in earlier.outputs]
        return any(pattern.search(argument) for pattern in named for argument in self.arguments)

    def fingerprint(self, before: str) -> str:
        """Hash of the step, its recipe files and the step before: whatever changes one changes all later ones."""
        digest = hashlib.sha256(before.encode())
        digest.update(json.dumps([self.name, self.arguments, self.outputs]).encode())
        for path in self.sources:
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class PipelineFile:
    """A pipeline with every variable filled in."""

    path: Path
    run_dir: Path
    steps: tuple[Step, ...]


def _fill(value: Any, variables: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, str):
        whole = _VARIABLE.fullmatch(value)
        if whole and whole[1] in variables:
            return variables[whole[1]]

        def replace(match: re.Match[str]) -> str:
            if match[1] not in variables:
                known = ", ".join(sorted(variables))
                raise UserError(f"{where}: unknown variable ${{{match[1]}}}; known: {known}")
            return str(variables[match[1]])

        return _VARIABLE.sub(replace, value)
    if isinstance(value, list):
        return [_fill(item, variables, where) for item in value]
    if isinstance(value, dict):
        return {key: _fill(item, variables, where) for key, item in value.items()}
    return value


def _as_argument(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value)


def _spliced(parts: list[Any]) -> list[Any]:
    """Items that are lists themselves (a variable that holds several words) become part of the command."""
    return [word for part in parts for word in (part if isinstance(part, list) else [part])]


def _line(settings: list[Setting], *path: str) -> str:
    lines = {setting.path: setting.where for setting in settings}
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, "")


def _step(raw: Any, index: int, variables: Mapping[str, Any], run_dir: Path, settings: list[Setting]) -> Step:
    where = _line(settings, "steps", str(index))
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a step must be a mapping with a name and either command or recipe, seen {raw!r}")
    for key in raw:
        if key not in _STEP_KEYS:
            place = _line(settings, "steps", str(index), str(key))
            raise UserError(f"{place}: unknown key {key!r} in a step; known: {', '.join(sorted(_STEP_KEYS))}")
    name = raw.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{where}: name: seen {name!r}, expected letters, digits, '_', '-' and '.'")
    if ("command" in raw) == ("recipe" in raw):
        raise UserError(f"{where}: step {name!r} needs exactly one of command and recipe")
    raw = {key: _fill(value, variables, where) for key, value in raw.items()}
    outputs = tuple(str(path) for path in raw.get("outputs", ()))
    beside = raw.get("beside", False)
    if not isinstance(beside, bool):
        raise UserError(f"{where}: beside: seen {beside!r}, expected true or false")
    if "command" in raw:
        if not isinstance(raw["command"], list) or not raw["command"]:
            raise UserError(f"{where}: command: seen {raw['command']!r}, expected a list such as [data, prepare, PATH]")
        command = tuple(_as_argument(part) for part in _spliced(raw["command"]))
        return Step(name, command, outputs, beside=beside)
    sources = [resolve_recipe(str(recipe)) for recipe in (raw["recipe"], *raw.get("overlays", ()))]
    arguments = [str(raw.get("verb", "fit"))]
    for source in sources:
        arguments += ["-c", str(source)]
    folder = run_dir / name
    values = {"trainer.default_root_dir": str(folder), **raw.get("set", {})}
    arguments += [f"--{key}={_as_argument(value)}" for key, value in values.items()]
    return Step(name, tuple(arguments), (*outputs, str(folder)), tuple(sources), beside)


def read_pipeline(name: str, run_dir: str | None = None, variables: Mapping[str, Any] | None = None) -> PipelineFile:
    """Read a pipeline file by path or short name.

    ``run_dir`` and ``variables`` override the file's. Raises UserError with the line of whatever does not fit.
    """
    path = resolve_recipe(name)
    settings = read_settings(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in content:
        if key not in _FILE_KEYS:
            where = _line(settings, str(key))
            raise UserError(f"{where}: unknown key {key!r} in a pipeline; known: {', '.join(sorted(_FILE_KEYS))}")
    if not isinstance(content.get("steps"), list) or not content["steps"]:
        raise UserError(f"{path}: steps: expected a list of steps")
    known = dict(content.get("vars") or {})
    for key, value in (variables or {}).items():
        if key not in known:
            raise UserError(f"--var {key}: {path} has no such variable; known: {', '.join(sorted(known)) or 'none'}")
        known[key] = value
    folder = run_dir or _fill(content.get("run_dir"), known, _line(settings, "run_dir"))
    if not isinstance(folder, str) or not folder:
        raise UserError(f"{path}: run_dir: seen {folder!r}, expected a folder such as runs/my_run")
    known["run_dir"] = folder
    for key in list(known):
        known[key] = _fill(known[key], known, _line(settings, "vars", key))
    steps = tuple(_step(raw, index, known, Path(folder), settings) for index, raw in enumerate(content["steps"]))
    names = [step.name for step in steps]
    for index, step_name in enumerate(names):
        if step_name in names[:index]:
            raise UserError(f"{_line(settings, 'steps', str(index))}: two steps are named {step_name!r}")
    return PipelineFile(path, Path(folder), steps)
