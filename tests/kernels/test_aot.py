"""Every shipped kernel compiles, for every GPU generation and within its recorded spills; and the gate can fail.

The compiler runs in a process without TRITON_INTERPRET, which the tests' own process sets where there is no GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def compile_cases(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, dict]]:
    """Exit code of ``qwen3_kernels.aot`` and its rows by case and generation."""
    table = tmp_path / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-m", "qwen3_kernels.aot", "--json", str(table), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert table.exists(), result.stdout + result.stderr
    return result.returncode, {f"{row['name']} sm_{row['generation']}": row for row in json.loads(table.read_text())}


@pytest.mark.slow
def test_every_shipped_kernel_compiles_within_its_recorded_resources(tmp_path: Path) -> None:
    code, rows = compile_cases(tmp_path)
    complaints = [f"{case}: {row['complaint']}" for case, row in rows.items() if row["complaint"]]
    assert not complaints, "\n".join(["", *complaints])
    assert code == 0 and rows


def test_the_gate_rejects_what_it_must(tmp_path: Path) -> None:
    code, rows = compile_cases(tmp_path, "--module", "rejected_kernels", "--jobs", "2")
    assert code == 1
    said = {row["name"]: row["complaint"] for row in rows.values()}
    assert said.pop("passes") == ""
    assert said.pop("spills").endswith("bytes spilled, 0 recorded")
    assert "bytes of shared memory, at most 232448 fit" in said.pop("shared_memory")
    assert "this_function_does_not_exist" in said.pop("does_not_compile")
    assert said.pop("no_wgmma") == "no wgmma instruction"
    assert "missing ['target_ptr', 'size']" in said.pop("argument_missing")
    assert "the compiler died" in said.pop("compiler_aborts")
    assert not said


def test_a_match_that_finds_nothing_is_an_error() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qwen3_kernels.aot", "--match", "no such kernel"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "no case matches 'no such kernel'" in result.stderr
