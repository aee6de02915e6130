"""Whole or absent, and errors about the file that has them."""

import errno
from pathlib import Path

import pytest

from qwen3_lit.curation.jsonl_output import jsonl_writer, write_json, write_jsonl
from qwen3_lit.errors import UserError


def test_an_input_that_cannot_be_read_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, jsonl_writer(tmp_path / "out.jsonl") as write:
        write({"a": 1})
        (tmp_path / "input.jsonl").read_text()
    assert error.value.filename == str(tmp_path / "input.jsonl")
    with pytest.raises(OSError, match="Input/output error"), jsonl_writer(tmp_path / "out.jsonl"):
        raise OSError(errno.EIO, "Input/output error")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"out\.jsonl: cannot be written: No space left"),
        jsonl_writer(tmp_path / "out.jsonl"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    (tmp_path / "file").touch()
    for write in (write_json, write_jsonl):
        with pytest.raises(UserError, match="file/out.json: cannot be written"):
            write(tmp_path / "file" / "out.json", [])
        with pytest.raises(UserError, match=f"{tmp_path.name}: cannot be written"):
            write(tmp_path, [])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
