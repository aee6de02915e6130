"""The console script: dispatch, help without torch, exit codes, one-line errors."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_lit.cli import main as cli
from qwen3_lit.errors import UserError


def test_overall_help_names_every_verb_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from qwen3_lit.cli.main import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'lightning', 'yaml', 'transformers', 'jsonargparse', 'rich', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    for verb in cli.VERBS:
        assert f"  {verb.name} " in out.stdout


def test_ls_imports_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from qwen3_lit.cli.main import main; main(['ls']); assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "5_reasoning_rl" in out.stdout and "[GRPOModule]" in out.stdout


def test_two_word_verbs() -> None:
    verb, rest = cli.find_verb(["data", "prepare", "x"])
    assert (verb.module, rest) == ("qwen3_lit.cli.data_prepare", ["x"])
    verb, rest = cli.find_verb(["fit", "-c", "r.yaml"])
    assert (verb.name, rest) == ("fit", ["-c", "r.yaml"])


@pytest.mark.parametrize(
    ("argv", "expected"), [(["piepline"], "'pipeline'"), (["data"], "tokenizer"), (["data", "prepar"], "prepare")]
)
def test_unknown_verbs_name_the_nearest(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert expected in capsys.readouterr().err


def test_verbs_of_the_table_exist_with_their_contract() -> None:
    import importlib.util

    for verb in cli.VERBS:
        spec = importlib.util.find_spec(verb.module)
        assert spec is not None and spec.origin is not None, f"{verb.name}: {verb.module} is missing"
        source = Path(spec.origin).read_text(encoding="utf-8")
        if verb.name not in cli.LIGHTNING_VERBS:
            for part in ("HELP = ", "def add_arguments(parser: argparse.ArgumentParser)", "def run(args: "):
                assert part in source, f"{verb.module}: lacks {part!r}"


def test_help_of_the_verbs_about_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "data prepare" in out and "data sample" in out and "pipeline" not in out


def _fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException, *argv: str) -> int:
    def fail(verb: cli.Verb, arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run_verb", fail)
    return cli.main(list(argv) or ["ls"])


def test_an_error_names_both_words_of_the_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fails_with(monkeypatch, UserError("x"), "data", "prepare", "a") == 2
    assert capsys.readouterr().err == "qwen3-lit data prepare: x\n"


@pytest.mark.parametrize("out", [["--out", "the/place"], ["--out=the/place"]])
def test_a_full_disk_without_a_path_names_what_was_written(
    out: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fails_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), "export", "run", *out) == 2
    assert "export: the/place: no space left" in capsys.readouterr().err


def test_user_errors_are_one_line_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fails_with(monkeypatch, UserError("a.jsonl:3: field 'text':\n  seen 3, expected text")) == 2
    assert capsys.readouterr().err == "qwen3-lit ls: a.jsonl:3: field 'text': seen 3, expected text\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_LIT_DEBUG", "1")
    with pytest.raises(UserError, match="x"):
        _fails_with(monkeypatch, UserError("x"))


def test_interruption_is_one_line_with_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fails_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_a_full_disk_is_one_line_also_when_wrapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapped = RuntimeError("writing the checkpoint failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device", "runs/x.ckpt")
    assert _fails_with(monkeypatch, wrapped) == 2
    assert "runs/x.ckpt: no space left" in capsys.readouterr().err


def test_missing_files_are_named_and_defects_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _fails_with(monkeypatch, FileNotFoundError(errno.ENOENT, "No such file or directory", "gone.json")) == 2
    assert "gone.json" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        _fails_with(monkeypatch, ZeroDivisionError())
