"""Which module defines which class, found by reading source text: short names in recipes cost one import, not all."""

import difflib
import importlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import qwen3_lit
from qwen3_lit.errors import UserError

_CLASS = re.compile(r"^class ([A-Za-z]\w*)", re.MULTILINE)
_PACKAGES = ("modules", "data", "losses", "rl", "optim", "callbacks", "distributed", "generation", "curation")


@cache
def class_index() -> dict[str, tuple[str, ...]]:
    """Class name -> dotted modules of qwen3_lit that define it at top level."""
    root = Path(qwen3_lit.__file__).parent
    found: dict[str, tuple[str, ...]] = {}
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            module = ".".join(("qwen3_lit", *path.relative_to(root).with_suffix("").parts))
            for name in _CLASS.findall(path.read_text(encoding="utf-8")):
                found[name] = (*found.get(name, ()), module)
    return found


def import_classes(names: Iterable[str]) -> None:
    """Import the modules of the named classes; names that are not ours are left to the parser.

    Raises UserError when two modules define the same name.
    """
    for name in names:
        modules = class_index().get(name, ())
        if len(modules) > 1:
            paths = " or ".join(f"{module}.{name}" for module in modules)
            raise UserError(f"class_path {name}: two classes have this name; write {paths}")
        if modules:
            importlib.import_module(modules[0])


def nearest_class(name: str) -> str | None:
    """The class of ours whose name is closest to a name that does not exist."""
    near = difflib.get_close_matches(name.rpartition(".")[2], class_index(), n=1, cutoff=0.5)
    return near[0] if near else None
