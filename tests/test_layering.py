"""The house rules, read from the source: who may import whom, names, lengths, and folders that are no packages."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qwen3_lit"
KERNELS = ROOT / "kernels" / "qwen3_kernels"

BASE = {"errors"}
MIDDLE = {"model", "data", "losses", "optim", "distributed"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "model": BASE,
    "data": BASE,
    "losses": BASE,
    "optim": BASE,
    "distributed": BASE,
    "generation": BASE | {"model", "data", "losses"},
    "rl": BASE | {"model", "data", "losses", "generation"},
    "curation": BASE | {"model", "data", "losses", "generation", "rl"},
    "modules": BASE | MIDDLE | {"generation", "rl", "curation"},
    "callbacks": BASE | MIDDLE | {"generation", "rl", "curation", "modules"},
    "evaluation": BASE | MIDDLE | {"generation", "rl", "curation", "modules"},
    "cli": BASE | MIDDLE | {"generation", "rl", "curation", "modules", "callbacks", "evaluation"},
}
"""Layer -> other layers of qwen3_lit that it may import. What a layer may not name at module level, it may not name
inside a function either."""

MAY_IMPORT_LIGHTNING = {"modules", "callbacks", "distributed", "cli"}
FORBIDDEN_NAMES = re.compile(r"(.*_)?(utils?|commons?|helpers?|misc)$")
MAX_LINES = 500


def _source_files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def _imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found.append((node.lineno, node.module or ""))
            if node.module == "qwen3_lit":
                found += [(node.lineno, f"qwen3_lit.{alias.name}") for alias in node.names]
    return found


def _layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", _source_files(PACKAGE), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    layer = _layer(path)
    if layer == "__init__":
        allowed: set[str] = set()
    else:
        assert layer in MAY_IMPORT, f"{path}: layer {layer!r} is not in the table of this test"
        allowed = MAY_IMPORT[layer] | {layer}
    for line, name in _imports(path):
        parts = name.split(".")
        if parts[0] == "qwen3_lit" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in allowed, f"{path}:{line}: {layer} may not import {name}"
        if parts[0] in ("lightning", "pytorch_lightning"):
            is_data_module = layer == "data" and (path.stem.endswith("_data") or path.stem == "text_data_module")
            assert layer in MAY_IMPORT_LIGHTNING or is_data_module, f"{path}:{line}: {layer} may not import lightning"
        assert parts[0] not in ("tests", "benchmarks", "recipes", "kernels"), f"{path}:{line}: imports {name}"


@pytest.mark.parametrize("path", _source_files(KERNELS), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_need_only_torch_and_triton(path: Path) -> None:
    import sys

    # flash-attn in any of its generations is an optional back-end, imported where it is used.
    allowed = {"torch", "triton", "qwen3_kernels", "flash_attn", "flash_attn_interface"} | set(sys.stdlib_module_names)
    for line, name in _imports(path):
        assert name.split(".")[0] in allowed, f"{path}:{line}: a kernel may not import {name}"


def test_folders_that_must_not_be_importable() -> None:
    for folder in ("kernels", "recipes", "benchmarks", "tests"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py: this folder must not be a package"
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize(
    "path",
    _source_files(PACKAGE, ROOT / "kernels", ROOT / "tests", ROOT / "benchmarks"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_names_and_lengths(path: Path) -> None:
    assert not FORBIDDEN_NAMES.match(path.stem), f"{path}: name the concept instead"
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{path}: {lines} lines; split it"


@pytest.mark.parametrize("path", _source_files(PACKAGE), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_wildcards_no_swallowed_errors_no_prints_in_the_library(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{path}:{node.lineno}: wildcard import"
        if isinstance(node, ast.ExceptHandler) and [type(part) for part in node.body] == [ast.Pass]:
            broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id.endswith("Exception"))
            assert not broad, f"{path}:{node.lineno}: swallows every error"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert _layer(path) in ("cli", "callbacks"), f"{path}:{node.lineno}: the library logs, it does not print"


@pytest.mark.parametrize("path", _source_files(PACKAGE, KERNELS), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_does_not_know_the_demo(path: Path) -> None:
    words = re.findall(r"\bnano\b", path.read_text(encoding="utf-8"))
    # The command line names the demo's pipeline in its help.
    assert not words or _layer_or_kernel(path) == "cli", f"{path}: only overlays and pipelines are called nano"


def _layer_or_kernel(path: Path) -> str:
    return _layer(path) if PACKAGE in path.parents else "kernels"


def test_the_package_is_importable_without_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, qwen3_lit, qwen3_lit.cli.main; "
        "print([name for name in ('torch', 'yaml', 'lightning') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
