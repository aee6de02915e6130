"""The installation: interrupted ones are repaired, and a wrong interpreter is one line."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INTERPRETER = """#!/bin/sh
# Makes environments whose pip notes what it was asked for.
case "$*" in
  "-m venv --clear .venv")
    rm -rf .venv && mkdir -p .venv/bin && cat > .venv/bin/python <<'END'
#!/bin/sh
echo "$*" >> pip.log
END
    chmod +x .venv/bin/python ;;
  "-c import venv"*) ;;
  *) printf 3.12 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    interpreter = tmp_path / "fake_python"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    return tmp_path


def _make(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", ".venv", f"PYTHON={python}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_an_environment_without_pip_is_made_anew(checkout: Path) -> None:
    half = checkout / ".venv" / "bin" / "python"
    half.parent.mkdir(parents=True)
    half.write_text("#!/bin/sh\nexit 1\n")
    half.chmod(0o755)
    for _ in range(2):
        out = _make(checkout, "./fake_python")
        assert out.returncode == 0, out.stderr
    asked = (checkout / "pip.log").read_text().splitlines()
    assert len(asked) == 1 and "install" in asked[0], "the second call has nothing to do"


def test_an_environment_whose_installation_was_cut_off_is_kept(checkout: Path) -> None:
    assert _make(checkout, "./fake_python").returncode == 0
    (checkout / ".venv" / ".installed").unlink()
    (checkout / ".venv" / "kept").touch()
    assert _make(checkout, "./fake_python").returncode == 0
    assert (checkout / ".venv" / "kept").exists()


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        ("/bin/ls", "/bin/ls is no Python interpreter"),
        ("/bin/echo", "/bin/echo is no Python interpreter"),
        ("./old", "./old is Python 3.9; this project needs Python >= 3.11"),
        ("./gone", "./gone was not found"),
    ],
)
def test_a_wrong_interpreter_is_one_line(checkout: Path, python: str, expected: str) -> None:
    (checkout / "old").write_text("#!/bin/sh\nprintf 3.9\n")
    (checkout / "old").chmod(0o755)
    out = _make(checkout, python)
    lines = [line for line in out.stderr.splitlines() if "***" not in line]  # make adds which target failed
    assert out.returncode == 2 and len(lines) == 1 and expected in lines[0], out.stderr
