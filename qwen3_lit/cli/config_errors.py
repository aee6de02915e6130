"""Turns a parser's complaint into one line: file, line, key, what was seen, what was expected, the nearest known key.

jsonargparse reports a problem inside a class as an indented tree of every Union member it tried. The first leaf of the
tree is the user's mistake; the keys on the way to it, looked up among the settings of the recipe files, give the place.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from qwen3_lit.cli.recipe_files import KeyPath, Setting

_PARSER_KEY = re.compile(r'Parser key "([^"]+)"')
_IN_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN = re.compile(r"(?:Option|Key) ['\"]([^'\"]+)['\"] is not (?:accepted|expected)")
_UNKNOWN_IN_GROUP = re.compile(r"Group '([^']+)' does not accept option '([^']+)'")
_UNKNOWN_AT_TOP = re.compile(r"Subcommand '[^']+' does not accept option '([^']+)'")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_BAD_IMPORT = re.compile(r"(?:Unexpected import path format|No module named|module '[^']+' has no attribute)\b.*")
_UNRECOGNIZED = re.compile(r"[Uu]nrecognized arguments?: (--)?([\w.+]+)")
_MISSING = re.compile(r"""(?:Key|Option|Argument) ["']([^"']+)["'] is required|arguments are required: ([\w.]+)""")
_EXPECTED = re.compile(r"Expected (?:a |an )?(.*?)(?:\. Got value: (.*))?$")

KnownKeys = Callable[[str | None, str], Sequence[str]]
"""(class path or None for the top, group within it or "") -> the keys that are accepted at that level."""
NearClass = Callable[[str], str | None]
"""A class name that does not exist -> the nearest one that does."""


def _plain(path: Sequence[str]) -> KeyPath:
    return tuple(part for part in path if part != "init_args" and not part.isdigit())


def locate(path: Sequence[str], settings: Sequence[Setting]) -> Setting | None:
    """The last setting of a key: the exact path, else the same final keys, else the nearest enclosing key."""
    wanted = _plain(path)
    for match in (lambda seen: seen == wanted, lambda seen: len(wanted) > 0 and seen[-len(wanted) :] == wanted):
        for setting in reversed(settings):
            if match(_plain(setting.path)):
                return setting
    return locate(wanted[:-1], settings) if len(wanted) > 1 else None


def _type_name(text: str) -> str:
    text = re.sub(r"<class '([^']+)'>", lambda match: match[1].rpartition(".")[2], text.strip())
    return {"NoneType": "null"}.get(text, re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text))


def _place(path: Sequence[str], settings: Sequence[Setting]) -> str:
    setting = locate(path, settings)
    return f"{setting.where}: " if setting else ""


def _unknown_key(
    base: Sequence[str], keys: Sequence[str], owner: str | None, known_keys: KnownKeys, settings: Sequence[Setting]
) -> str:
    """The line for a key that is not accepted: the first of ``keys`` that its level does not know is the mistake."""
    depth = len(keys) - 1
    for level in range(len(keys)):
        if keys[level] not in known_keys(owner, ".".join(keys[:level])):
            depth = level
            break
    group = ".".join(keys[:depth])
    known = sorted(known_keys(owner, group))
    near = difflib.get_close_matches(keys[depth], known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known[:12])}"
    where = group or ((owner or "").rpartition(".")[2] or "the recipe")
    return f"{_place([*base, *keys[: depth + 1]], settings)}unknown key {keys[depth]!r} in {where}; {hint}"


def explain(message: str, settings: Sequence[Setting], known_keys: KnownKeys, near_class: NearClass) -> str:
    """One line for a parser's error message.

    ``settings`` are those of all files and of the command line in order; ``known_keys`` and ``near_class`` look up
    what would have been accepted.
    """
    path: list[str] = []
    owner: str | None = None
    expected: list[str] = []
    seen = ""
    for line in message.splitlines():
        if match := _UNKNOWN_AT_TOP.search(line) or _UNRECOGNIZED.search(line):
            return _unknown_key([], match[match.lastindex or 1].split("."), None, known_keys, settings)
        if match := _PARSER_KEY.search(line):
            path += match[1].split(".")
        elif match := _IN_CLASS.search(line):
            owner = match[1]
        elif match := _UNKNOWN_IN_GROUP.search(line):
            return _unknown_key(path, [*match[1].split("."), *match[2].split(".")], owner, known_keys, settings)
        elif match := _UNKNOWN.search(line):
            return _unknown_key(path, match[1].split("."), owner, known_keys, settings)
        elif match := _UNKNOWN_CLASS.search(line):
            near = near_class(match[1])
            hint = f"did you mean {near!r}?" if near else "write its full import path"
            where = _place([*path, "class_path"], settings)
            return f"{where}{'.'.join(path)}: there is no class {match[1]!r}; {hint}"
        elif match := _MISSING.search(line):
            full = [*path, match[1] or match[2]]
            return f"{_place(full, settings)}{'.'.join(full)} is not set; it is required"
        elif match := _BAD_IMPORT.search(line):
            near = near_class(owner or "")
            hint = f"; did you mean {near!r}?" if near else ""
            if match[0].startswith("No module named"):
                hint = f"; expected it in {Path.cwd()} or among the installed packages"
            return f"{_place([*path, 'class_path'], settings)}{'.'.join(path)}: {match[0].strip()}{hint}"
        elif line.strip().startswith("- ") or "Got value" in line:
            text = line.strip().removeprefix("- ")
            if match := _EXPECTED.search(text):
                expected.append(_type_name(match[1]))
                seen = match[2] or seen
            elif text:
                return _from_value_error(text, path, settings)
        elif line.strip().startswith("Given value:"):
            seen = seen or line.partition("Given value:")[2].strip()
            break
    if path and expected:
        wanted = " or ".join(dict.fromkeys(expected))
        setting = locate(path, settings)
        shown = setting.value if setting and setting.value is not None else seen
        return f"{_place(path, settings)}{'.'.join(path)}: seen {_clip(shown)!r}, expected {wanted}"
    return _from_value_error(_clip(" ".join(message.split()), 300), path, settings)


def _clip(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _from_value_error(text: str, path: Sequence[str], settings: Sequence[Setting]) -> str:
    """A message of a config's own check: its first word names the field, which gives the line."""
    text = " ".join(text.split())
    match = re.match(r"`?([A-Za-z_][\w.]*)\b", text)
    setting: Setting | None = None
    if match:
        wanted = _plain([*path, *match[1].split(".")])
        name = _plain(match[1].split("."))
        candidates = [s for s in settings if s.value is not None and _plain(s.path)[-len(name) :] == name]
        exact = [s for s in candidates if _plain(s.path) == wanted]
        found = exact or candidates
        setting = found[-1] if found else None
    return f"{setting.where}: {text}" if setting else text


def _set_by_path(message: str, settings: Sequence[Setting]) -> Setting | None:
    """The last setting of the longest path that a message opens with, such as ``init_from`` of a missing folder."""
    found: tuple[int, Setting] | None = None
    for setting in settings:
        for path in {setting.value or "", str(Path(setting.value or ""))}:
            opens = re.match(rf"{re.escape(path)}[/:]", message) if len(path) > 1 else None
            if opens and (found is None or len(path) >= found[0]):
                found = len(path), setting
    return found[1] if found else None


def explain_value_error(message: str, settings: Sequence[Setting]) -> str:
    """One line for an error raised while the classes are built or the run is set up.

    A message opens with the field of a config's own check, or with the file or folder that is at fault.
    """
    if "Errors:" in message:
        bullets = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip().startswith("- ")]
        own = [text for text in bullets if not re.match(r"Expected a|Problem with|Not a valid subclass", text)]
        message = own[0] if own else message
    if setting := _set_by_path(message, settings):
        return f"{setting.where}: {'.'.join(setting.path)}: {' '.join(message.split())}"
    return _from_value_error(message, (), settings)
