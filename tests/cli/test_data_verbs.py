import io
import json
from pathlib import Path

import pytest

from qwen3_lit.cli.main import main

TEXT = "def add(first, second):\n    return first + second\n\n# counts from one to twenty, one by one\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs")
    (folder / "in").mkdir()
    for i in range(60):
        (folder / "in" / f"{i}.py").write_text(TEXT + f"# file {i}\n" * (i + 1))
    tokenizer = ["data", "tokenizer", str(folder / "in"), "--out", str(folder / "tokenizer"), "--vocab-size", "320"]
    assert main([*tokenizer, "--max-bytes", "20000"]) == 0
    assert main(prepare_words(folder, "corpus")) == 0
    return folder


def prepare_words(root: Path, out: str) -> list[str]:
    words = ["data", "prepare", str(root / "in"), "--out", str(root / out), "--tokenizer", str(root / "tokenizer")]
    return [*words, "--held-out-fraction", "0.1", "--workers", "1"]


def one_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and "shards" not in line]
    assert len(lines) == 1 and "Traceback" not in text
    return lines[0]


def test_tokenizer_is_repeatable_and_not_overwritten(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "tokenizer", str(root / "in"), "--vocab-size", "320", "--max-bytes", "20000", "--out"]
    assert main([*words, str(root / "again")]) == 0
    assert (root / "again" / "tokenizer.json").read_bytes() == (root / "tokenizer" / "tokenizer.json").read_bytes()
    capsys.readouterr()
    assert main([*words, str(root / "again")]) == 2
    assert "holds a tokenizer already" in one_line(capsys.readouterr().err)


def test_prepare_a_second_time_does_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (root / "corpus" / "prepared.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(prepare_words(root, "corpus")) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out and "documents" in out
    assert (root / "corpus" / "prepared.json").stat().st_mtime_ns == before


def test_bad_input_is_one_line_and_leaves_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "empty").mkdir()
    bad = root / "bad.jsonl"
    bad.write_text('{"text": "' + "fine " * 30 + '"}\n{"content": "x"}\n')
    for path, message in (
        (root / "empty", "no readable text found"),
        (root / "missing", "no such file or folder"),
        (bad, "bad.jsonl:2: field 'text'"),
    ):
        words = prepare_words(root, "nothing")
        words[2] = str(path)
        capsys.readouterr()
        assert main(words) == 2
        assert message in one_line(capsys.readouterr().err)
        assert not (root / "nothing").exists()


def test_inspect_a_corpus(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "inspect", "--data", str(root / "corpus"), "--tokenizer", str(root / "tokenizer")]
    assert main([*words, "--sequence-length", "256", "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert "row 1: 256 tokens" in out and "return first + second" in out and "lengths of" in out
    assert "source corpus:" in out and "held-out:" in out


def test_inspect_colours_exactly_the_trained_tokens(root: Path) -> None:
    from rich.console import Console

    from qwen3_lit.cli.data_inspect import datamodule_from_paths, inspect_datamodule

    record = {"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "the reply"}]}
    path = root / "dialog.jsonl"
    path.write_text(json.dumps(record) + "\n")
    datamodule = datamodule_from_paths([str(path)], str(root / "tokenizer"), None, 128)
    console = Console(record=True, width=200, force_terminal=True, file=io.StringIO())
    inspect_datamodule(datamodule, 1, console)
    segments = console.export_text(styles=True)
    trained = "".join(part.split("m", 1)[1].split("\x1b")[0] for part in segments.split("\x1b[1;32") if part[:1] == "m")
    assert "the reply<|im_end|>" in trained
    assert "question" not in trained and "user" not in trained
    assert "question" in segments


def test_inspect_a_recipe_with_overlay(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, overlay = root / "recipe.yaml", root / "overlay.yaml"
    recipe.write_text(
        "data:\n  class_path: PretrainData\n  init_args:\n"
        f"    tokenizer_path: {root / 'tokenizer'}\n    sources:\n    - path: {root / 'corpus'}\n"
        "    sequence_length: 128\n    batch_tokens: 256\n"
        "    length_mix:\n    - {min_tokens: 0, max_tokens: null, fraction: 1.0}\n"
        "trainer:\n  max_steps: 3\n"
    )
    overlay.write_text("data:\n  init_args:\n    batch_tokens: 384\n")
    words = ["data", "inspect", "-c", str(recipe), "-c", str(overlay), "-n", "1"]
    assert main(words) == 0
    assert "row 0: 384 tokens" in capsys.readouterr().out
    assert main([*words, "--set", "data.batch_tokens=512"]) == 0
    assert "row 0: 512 tokens" in capsys.readouterr().out
    overlay.write_text("data:\n  init_args:\n    batch_tokns: 384\n")
    assert main(words) == 2
    error = one_line(capsys.readouterr().err)
    assert "batch_tokns" in error and "overlay.yaml:3" in error


def test_inspect_needs_one_of_the_two_forms(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect"]) == 2
    assert main(["data", "inspect", "--data", str(root / "corpus")]) == 2
    assert "--tokenizer" in capsys.readouterr().err
