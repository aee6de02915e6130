"""The page: what it says, what it links, and that it never breaks on what models write."""

import argparse
import json
import re
from pathlib import Path

import pytest

from qwen3_lit.cli import report
from qwen3_lit.evaluation.report_pages import write_report
from qwen3_lit.evaluation.verdicts import change, verdicts


@pytest.fixture
def page(run_dir: Path) -> str:
    return write_report(run_dir).read_text()


def test_every_picture_is_there(run_dir: Path, page: str) -> None:
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert "report/overview.png" in links and "5_reasoning_rl/expert_load.png" in links
    for link in links:
        assert (run_dir / link).read_bytes().startswith(b"\x89PNG"), link


def test_every_anchor_has_its_heading(page: str) -> None:
    headings = {line.lstrip("# ").strip() for line in page.splitlines() if line.startswith("#")}
    anchors = re.findall(r"\]\(#([^)]+)\)", page)
    assert len(anchors) == 9 and set(anchors) <= headings


def test_verdicts_in_plain_words(page: str) -> None:
    for line in (
        "- held-out loss: 7.600 -> 4.100 (-46 %)",
        "- accuracy: 31.0 % -> 58.0 % (+27.0 points)",
        "- four times the trained length: plain attention 5.200, dual chunk attention 3.900: better",
        "- candidates kept: 60.0 %, 320 dropped",
        "- mode flag obeyed: 97.0 %",
        "- a point of accuracy took 3.0 s; reinforcement learning from the same checkpoint took 30.0 s for one, "
        "10.0 times as much",
    ):
        assert line in page
    assert "| wrong_answer | 300 |" in page
    assert "| title | 0.200 -> 0.800 |" in page


def test_stages_are_compared_on_the_same_problems_only(page: str) -> None:
    table = page.split("## Stage by stage")[1].split("## 1_")[0]
    first, second = re.split("Problems: general", table)
    assert "| accuracy, thinking | 31.0 % | 58.0 % (+27.0) | 55.0 % (-3.0) | 40.0 % |  |" in first
    assert "| tokens a completion, thinking | 90 | 101 (+11) |" in first
    assert "7_general_rl" not in first and "5_reasoning_rl" not in second


def test_samples_show_before_and_after_and_cannot_close_their_fence(page: str) -> None:
    section = page.split("## 5_reasoning_rl")[2 if page.startswith("## 5") else 1].split("## 6_")[0]
    assert section.index("*before, chain_sum, think, reference `42`, wrong*") < section.index("*after, chain_sum")
    assert "`````text\nshow code\n---\n````py" in section, "the fence is longer than any inside"


def test_json_beside_the_page(run_dir: Path, page: str) -> None:
    content = json.loads((run_dir / "report.json").read_text())
    assert set(content) >= {"total_seconds", "peak_rss_gb", "phases"}


def test_a_phase_that_lacks_a_figure_is_named(run_dir: Path) -> None:
    (run_dir / "data" / "cold_start_report.json").unlink()
    assert "**4_cold_start_sft lacks kept_fraction, dropped.**" in write_report(run_dir).read_text()


def test_the_verb_can_be_repeated(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    for _ in range(2):
        assert report.run(parser.parse_args([str(run_dir)])) == 0
    assert "report.md" in capsys.readouterr().out
    assert not list(run_dir.rglob("*.tmp"))


def test_changes_by_kind_of_figure() -> None:
    assert change("held_out_loss", 4.0, 3.0) == "4.000 -> 3.000 (-25 %)"
    assert change("accuracy_think", 0.5, 0.45) == "50.0 % -> 45.0 % (-5.0 points)"
    assert change("reward", 0.25, 0.5) == "0.250 -> 0.500 (+0.250)"


def test_a_worse_dual_chunk_loss_is_not_called_better() -> None:
    assert verdicts({"held_out_loss_4x_plain": 3.0, "held_out_loss_4x_dca": 3.0})[0].endswith("no better")
