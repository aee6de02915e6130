"""Recipe files as text: where they lie, which line sets which key, and which of them may be stacked.

A recipe names classes (``class_path``, or a bare name in its place); an overlay names none and comes after the recipe.
Two files that set different classes under one key are refused, because the parser would hand the first class's
arguments to the second. Nothing here imports torch or the classes themselves.
"""

import difflib
import re
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

import qwen3_lit
from qwen3_lit.cli.class_index import class_index
from qwen3_lit.errors import UserError

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """One leaf or inner key of a recipe, overlay or command line."""

    path: KeyPath
    """Keys from the top; list positions appear as their number."""
    file: str
    """The file as the user named it, or "command line"."""
    line: int
    """Line in the file, from 1; 0 for the command line."""
    value: str | None
    """The scalar as text, or None for an inner key."""
    is_empty_mapping: bool = False
    """Whether the value is ``{}``."""

    @property
    def where(self) -> str:
        """``file:line``, or ``command line``."""
        return f"{self.file}:{self.line}" if self.line else self.file


def recipes_folder() -> Path:
    """The folder of shipped recipes: beside the package in a checkout, under the prefix when installed."""
    beside = Path(qwen3_lit.__file__).resolve().parents[1] / "recipes"
    installed = Path(sys.prefix) / "share" / "qwen3_lit" / "recipes"
    for folder in (beside, installed):
        if folder.is_dir():
            return folder
    raise UserError(f"the shipped recipes are missing: looked in {beside} and {installed}; reinstall qwen3_lit")


def shipped_names() -> list[str]:
    """Short names of everything shipped, such as ``5_reasoning_rl`` and ``size/8b``."""
    folder = recipes_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def resolve_recipe(name: str) -> Path:
    """The file that a user's name means: a path, or a short name within the shipped recipes.

    Raises UserError naming the nearest shipped names.
    """
    direct = Path(name)
    if direct.is_file():
        return direct
    short = name.removeprefix("./").removeprefix("recipes/").removesuffix(".yaml")
    shipped = recipes_folder() / f"{short}.yaml"
    if shipped.is_file():
        try:
            return shipped.relative_to(Path.cwd())
        except ValueError:
            return shipped
    names = shipped_names()
    near = difflib.get_close_matches(short, names, n=3, cutoff=0.4) or [n for n in names if short in n][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else "`qwen3-lit ls` lists the shipped ones"
    raise UserError(f"{name}: no such recipe file; {hint}")


def _walk(node: yaml.Node, path: KeyPath, file: str) -> Iterator[Setting]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise UserError(f"{file}:{line}: key {'.'.join((*path, key))} is set twice, first in line {seen[key]}")
            seen[key] = line
            scalar = value_node.value if isinstance(value_node, yaml.ScalarNode) else None
            empty = isinstance(value_node, yaml.MappingNode) and not value_node.value
            yield Setting((*path, key), file, line, scalar, empty)
            yield from _walk(value_node, (*path, key), file)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            scalar = item.value if isinstance(item, yaml.ScalarNode) else None
            yield Setting((*path, str(index)), file, item.start_mark.line + 1, scalar)
            yield from _walk(item, (*path, str(index)), file)


def read_settings(path: Path) -> list[Setting]:
    """Every key of a YAML file with its line; UserError when it is no mapping or no YAML."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8: byte {error.start}; expected a YAML recipe") from error
    if node is None:
        raise UserError(f"{path}: the file is empty; expected a recipe or an overlay")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: expected keys such as `model:` at the top")
    return list(_walk(node, (), str(path)))


def _typed_settings(path: KeyPath, value: str) -> list[Setting]:
    """One ``--key=value`` as settings; a mapping or list written in place is taken apart like one in a file."""
    found = [Setting(path, "command line", 0, value)]
    if value.lstrip().startswith(("{", "[")):
        try:
            node = yaml.compose(value, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise UserError(f"--{'.'.join(path)}: not valid YAML or JSON: seen {value!r}") from error
        if node is not None:
            found += [Setting(s.path, "command line", 0, s.value) for s in _walk(node, path, "command line")]
    return found


def split_arguments(argv: Sequence[str]) -> tuple[list[Path], list[str], list[Setting]]:
    """Pull the ``-c`` files out of a command line and resolve them.

    Returns the files, the arguments with the resolved files put back in place, and the ``--key=value`` settings.
    """
    files: list[Path] = []
    rest: list[str] = []
    settings: list[Setting] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-c", "--config"):
            if not words:
                raise UserError(f"{word}: expected a recipe file after it")
            name = words.pop(0)
        elif word.startswith("--config=") or (word.startswith("-c") and not word.startswith("--")):
            name = word.partition("=")[2] if "=" in word else word[2:]
        else:
            rest.append(word)
            if word.startswith("--"):
                key, equals, value = word[2:].partition("=")
                if not equals and words and not words[0].startswith("-"):
                    value = words.pop(0)
                    rest.append(value)
                settings += _typed_settings(tuple(key.split(".")), value)
            continue
        files.append(resolve_recipe(name))
        rest += ["-c", str(files[-1])]
    return files, rest, settings


_NULL = ("null", "~", "")
_CLASS_NAME = re.compile(r"(?:\w+\.)*[A-Z]\w*")


def _short(setting: Setting) -> str:
    """The class name at the end of an import path."""
    return (setting.value or "").rpartition(".")[2]


def _class_key(path: KeyPath) -> KeyPath:
    """Where a class is set, one way for all spellings: the parser takes keys with and without ``init_args``."""
    return tuple(part for part in path if part not in ("class_path", "init_args"))


def _names_class(setting: Setting, known: Container[KeyPath]) -> bool:
    """Whether the value is a class: under ``class_path``, or the bare name that the parser takes in its place."""
    if setting.path[-1] == "class_path" or setting.path in (("model",), ("data",)):
        return True
    value = setting.value or ""
    return value in class_index() or (_class_key(setting.path) in known and bool(_CLASS_NAME.fullmatch(value)))


def check_stack(stacks: Sequence[Sequence[Setting]]) -> None:
    """Refuse stacks that would mix two classes, or an overlay that comes before its recipe.

    ``stacks`` holds the settings of each file in order, the command line last. Raises UserError with both places.
    """
    classes: dict[KeyPath, Setting] = {}
    orphans: dict[KeyPath, Setting] = {}
    for settings in stacks:
        named_here: dict[KeyPath, Setting] = {}
        for setting in settings:
            if setting.value is None or any(part.isdigit() for part in setting.path):
                continue
            key = _class_key(setting.path)
            if setting.value in _NULL and key in classes:  # null forgets the class and its arguments
                classes = {known: first for known, first in classes.items() if known[: len(key)] != key}
            elif _names_class(setting, classes):
                named_here[key] = setting
        for key, setting in named_here.items():
            first = classes.get(key)
            if first and _short(first) != _short(setting):
                raise UserError(
                    f"{setting.where}: {'.'.join(key)} is set to {setting.value}, but {first.where} set it to "
                    f"{first.value}, whose arguments would go to {_short(setting)}: copy one recipe (`qwen3-lit cp`), "
                    "name the class there and stack only overlays without class_path"
                )
            if key in orphans and not first:
                early = orphans[key]
                raise UserError(
                    f"{early.where}: {'.'.join(early.path)} is set before {setting.where} names the class; "
                    f"overlays come after their recipe: write -c {setting.file} before -c {early.file}"
                )
            classes.setdefault(key, setting)
        for setting in settings:
            if "init_args" in setting.path:
                key = setting.path[: setting.path.index("init_args")]
                if key not in classes and not any(part.isdigit() for part in key):
                    orphans.setdefault(key, setting)


def check_empty(settings: Sequence[Setting]) -> None:
    """Refuse ``key: {}``: the parser drops it unread, so that a misspelt key would go unnoticed."""
    for setting in settings:
        if setting.is_empty_mapping and setting.path[-1] not in ("init_args", "dict_kwargs"):
            key = ".".join(setting.path)
            raise UserError(f"{setting.where}: {key} is an empty mapping, which sets nothing; remove it")


def class_names(settings: Sequence[Setting]) -> list[str]:
    """Short class names that the settings mention, in order, each once (dotted paths import themselves)."""
    names: dict[str, None] = {}
    for setting in settings:
        direct = len(setting.path) == 1 and setting.path[0] in ("model", "data")
        wanted = direct or setting.path[-1] in ("class_path", "help")
        if wanted and isinstance(setting.value, str) and re.fullmatch(r"[A-Za-z_]\w*", setting.value):
            names[setting.value] = None
    return list(names)


def header(path: Path) -> dict[str, str]:
    """The ``# key: text`` lines of a recipe's opening comment; continuation lines are joined."""
    fields: dict[str, str] = {}
    key = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        match = re.match(r"#\s{0,2}(what|phase|module|needs|run|expect|next|source):\s*(.*)", line)
        if match:
            key = match[1]
            fields[key] = match[2].strip()
        elif key and line.strip("# "):
            fields[key] += " " + line.strip("# ")
    return fields
