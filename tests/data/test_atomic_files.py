"""Files and folders that are whole or absent: kills, full disks, leftovers."""

import errno
import os
from pathlib import Path

import pytest

from qwen3_lit.data.atomic_files import new_file, new_folder, write_text

DEAD = 2**22 + 1  # above the largest process id of Linux


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_leftovers_of_dead_processes_are_removed_by_the_next_writer_of_that_name(make, tmp_path: Path) -> None:
    kept = [tmp_path / f".a.{os.getppid()}.tmp", tmp_path / f".b.{DEAD}.tmp", tmp_path / f"a.{DEAD}.tmp"]
    for path in kept:
        path.touch()
    (tmp_path / f".a.{DEAD}.tmp").mkdir()
    (tmp_path / f".a.{DEAD + 1}.tmp").touch()
    with make(tmp_path / "a") as temporary:
        if make is new_file:
            temporary.touch()
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "a"])


def test_a_full_disk_names_the_final_path_and_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "before")
    for make, name in ((new_file, "a"), (new_folder, "b")):
        with pytest.raises(OSError, match="No space") as error, make(tmp_path / name):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert error.value.filename == str(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "before"


def test_errors_about_other_files_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, new_file(tmp_path / "a"):
        (tmp_path / "input").read_text()
    assert error.value.filename == str(tmp_path / "input")
    with pytest.raises(FileNotFoundError) as error, new_file(tmp_path / "gone" / "a") as temporary:
        temporary.touch()
    assert error.value.filename == str(tmp_path / "gone" / "a")
