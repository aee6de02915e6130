"""The pipeline runner: variables, fingerprints, skipping, clean restarts, kills, locks."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen3_lit.cli import pipeline
from qwen3_lit.cli.main import main
from qwen3_lit.cli.pipeline_file import read_pipeline
from qwen3_lit.cli.process_memory import tree_resident_bytes
from qwen3_lit.cli.step_process import StepProcess
from qwen3_lit.errors import UserError

TWO_COPIES = """
run_dir: {run_dir}
vars: {{source: size/nano, second: size/4b}}
steps:
  - {{name: one, command: [cp, "${{source}}", "${{run_dir}}/one.yaml"], outputs: ["${{run_dir}}/one.yaml"]}}
  - {{name: two, command: [cp, "${{second}}", "${{run_dir}}/two.yaml"], outputs: ["${{run_dir}}/two.yaml"]}}
"""


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs train nothing, so there is nothing to report."""
    monkeypatch.setattr(pipeline, "_report", lambda *args: 0)


def _write(tmp_path: Path, text: str = TWO_COPIES) -> tuple[str, Path]:
    run_dir = tmp_path / "run"
    path = tmp_path / "pipeline.yaml"
    path.write_text(text.format(run_dir=run_dir))
    return str(path), run_dir


def _state(run_dir: Path) -> dict:
    return json.loads((run_dir / "pipeline_state.json").read_text())


def test_variables_and_recipe_steps(tmp_path: Path) -> None:
    text = """
run_dir: {run_dir}
vars: {{seed: 3, data: "${{run_dir}}/data"}}
steps:
  - name: fit_it
    recipe: recipes/4_cold_start_sft.yaml
    overlays: [size/nano, hardware/cpu]
    set: {{seed_everything: "${{seed}}", data.init_args.paths: ["${{data}}/a.jsonl"], data.init_args.epochs: null}}
"""
    path, run_dir = _write(tmp_path, text)
    (step,) = read_pipeline(path).steps
    assert step.arguments[0] == "fit"
    assert [Path(a).name for a in step.arguments[2:7:2]] == ["4_cold_start_sft.yaml", "nano.yaml", "cpu.yaml"]
    assert step.arguments[7:] == (
        f"--trainer.default_root_dir={run_dir}/fit_it",
        "--seed_everything=3",
        f'--data.init_args.paths=["{run_dir}/data/a.jsonl"]',
        "--data.init_args.epochs=null",
    )
    assert step.outputs == (f"{run_dir}/fit_it",)
    assert read_pipeline(path, variables={"seed": 5}).steps[0].arguments[8] == "--seed_everything=5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_dir: r\nstep: []\n", r"pipeline.yaml:2: unknown key 'step'"),
        ("run_dir: r\nsteps: []\n", "expected a list of steps"),
        ("run_dir: r\nsteps:\n  - {name: a, comand: [ls]}\n", r"pipeline.yaml:3: unknown key 'comand'"),
        ("run_dir: r\nsteps:\n  - {name: a}\n", r"pipeline.yaml:3: step 'a' needs exactly one of"),
        ("run_dir: r\nsteps:\n  - {name: a, command: [ls, '${x}']}\n", r"unknown variable \$\{x\}; known: run_dir"),
        ("run_dir: r\nsteps:\n  - {name: a, recipe: size/nanno}\n", "did you mean"),
        ("run_dir: r\nsteps:\n  - {name: a, command: [ls], beside: yes please}\n", "3: beside: seen 'yes please'"),
        ("steps:\n  - {name: a, command: [ls]}\n", "run_dir"),
        ("run_dir: r\nsteps:\n  - {name: a, command: [ls]}\n  - {name: a, command: [ls]}\n", "two steps are named"),
    ],
)
def test_mistakes_in_a_pipeline_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_pipeline(str(path))


@pytest.mark.usefixtures("no_report")
def test_done_steps_are_skipped_and_changed_ones_run_again_with_all_later_ones(tmp_path: Path) -> None:
    path, run_dir = _write(tmp_path)
    assert main(["pipeline", path]) == 0
    first, second = (run_dir / "one.yaml").stat().st_mtime_ns, (run_dir / "two.yaml").stat().st_mtime_ns
    state = _state(run_dir)
    assert all(state["steps"][name]["done"] for name in ("one", "two"))
    assert state["total_seconds"] > 0 and state["peak_rss_gb"] > 0

    assert main(["pipeline", path]) == 0
    assert (run_dir / "one.yaml").stat().st_mtime_ns == first

    assert main(["pipeline", path, "--var", "second=size/8b"]) == 0
    assert (run_dir / "one.yaml").stat().st_mtime_ns == first
    assert "Qwen3-8B" in (run_dir / "two.yaml").read_text()

    assert main(["pipeline", path, "--var", "second=size/8b", "--var", "source=size/tiny"]) == 0
    assert (run_dir / "one.yaml").stat().st_mtime_ns != first
    assert (run_dir / "two.yaml").stat().st_mtime_ns != second, "a step after a changed one must run again"


@pytest.mark.usefixtures("no_report")
def test_from_and_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run_dir = _write(tmp_path)
    assert main(["pipeline", path, "--only", "one"]) == 0
    assert (run_dir / "one.yaml").exists() and not (run_dir / "two.yaml").exists()
    assert main(["pipeline", path]) == 0
    first, second = (run_dir / "one.yaml").stat().st_mtime_ns, (run_dir / "two.yaml").stat().st_mtime_ns
    assert main(["pipeline", path, "--from", "two"]) == 0
    assert (run_dir / "one.yaml").stat().st_mtime_ns == first
    assert (run_dir / "two.yaml").stat().st_mtime_ns != second
    assert main(["pipeline", path, "--from", "three"]) == 2
    assert "steps: one, two" in capsys.readouterr().err


def test_a_forced_run_that_was_interrupted_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run_dir = _write(tmp_path)
    monkeypatch.setattr(pipeline, "_report", lambda *args: 0)
    assert main(["pipeline", path]) == 0
    ran: list[str] = []

    class KilledInTwo(StepProcess):
        def __init__(self, arguments: tuple[str, ...], *rest: object) -> None:
            ran.append(arguments[-1].rpartition("/")[2])
            if len(ran) == 2:
                raise KeyboardInterrupt
            super().__init__(arguments, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "StepProcess", KilledInTwo)
    assert main(["pipeline", path, "--from", "one"]) == 130
    assert main(["pipeline", path, "--from", "one"]) == 0
    assert ran == ["one.yaml", "two.yaml", "two.yaml"]
    assert _state(run_dir)["forced"] == {}


@pytest.mark.usefixtures("no_report")
def test_a_failing_step_stops_the_pipeline_with_its_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, run_dir = _write(tmp_path)
    assert main(["pipeline", path, "--var", "source=size/gone"]) == 2
    err = capfd.readouterr().err
    assert "size/gone: no such recipe file" in err and "step one ended with exit code 2" in err
    assert not _state(run_dir)["steps"]["one"]["done"] and "two" not in _state(run_dir)["steps"]


LONG = """
run_dir: {run_dir}
steps:
  - {{name: one, command: [cp, size/nano, "${{run_dir}}/one.yaml"]}}
  - {{name: two, command: [data, synthesize, worked_steps, --out, "${{run_dir}}/x.jsonl", --count, 100000000]}}
"""

BESIDE = """
run_dir: {run_dir}
vars: {{count: 2000}}
steps:
  - name: slow
    beside: true
    command: [data, synthesize, worked_steps, --out, "${{run_dir}}/slow.jsonl", --count, "${{count}}"]
    outputs: ["${{run_dir}}/slow.jsonl"]
  - {{name: quick, command: [cp, size/nano, "${{run_dir}}/quick.yaml"], outputs: ["${{run_dir}}/quick.yaml"]}}
  - {{name: waits, command: [cp, "${{run_dir}}/quick.yaml", "${{run_dir}}/slow.jsonl.yaml"]}}
  - {{name: needs, command: [cp, "${{run_dir}}/slow.jsonl", "${{run_dir}}/needs.yaml"]}}
  - name: after_quick
    beside: true
    command: [cp, "${{run_dir}}/quick.yaml", "${{run_dir}}/after_quick.yaml"]
"""


def test_a_step_needs_what_it_names(tmp_path: Path) -> None:
    path, run_dir = _write(tmp_path, BESIDE)
    slow, quick, waits, needs, after_quick = read_pipeline(path).steps
    assert waits.needs(quick) and needs.needs(slow) and after_quick.needs(quick)
    assert not waits.needs(slow), "slow.jsonl.yaml is another file than slow.jsonl"
    folder = pipeline.Step("a", (), (str(run_dir / "a"),))
    for argument, named in (("a/hf", True), ("a", True), ("ab", False), ("a.b", False), ("a-b/c", False)):
        step = pipeline.Step("b", (f'--x=[{{"path": "{run_dir}/{argument}"}}]',), ())
        assert step.needs(folder) == named, argument


@pytest.mark.usefixtures("no_report")
def test_a_step_runs_beside_the_others_until_one_needs_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, run_dir = _write(tmp_path, BESIDE)
    assert main(["pipeline", path]) == 0
    out = capfd.readouterr().out
    order = [out.index(text) for text in ("slow, beside", "quick\n$", "waits\n$", "slow: done", "needs\n$")]
    assert order == sorted(order)
    assert "2000 records" in (run_dir / "logs" / "slow.log").read_text()
    state = _state(run_dir)
    steps = state["steps"]
    assert state["total_seconds"] == pytest.approx(sum(step["wall_seconds"] for step in steps.values()), abs=0.1)
    assert steps["slow"]["wall_seconds"] < steps["slow"]["seconds"] - steps["quick"]["seconds"] / 2


@pytest.mark.usefixtures("no_report")
def test_a_failure_beside_shows_its_last_lines_and_stops_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, run_dir = _write(
        tmp_path, LONG.replace("size/nano", "size/gone").replace("name: one,", "name: one, beside: true,")
    )
    assert main(["pipeline", path]) == 2
    err = capfd.readouterr().err
    assert "last lines of" in err and "size/gone: no such recipe file" in err and "step one ended with" in err
    assert not any(step["done"] for step in _state(run_dir)["steps"].values())
    assert not _children(os.getpid())


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run_dir = _write(tmp_path)
    assert main(["pipeline", path, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"one: qwen3-lit cp size/nano {run_dir}/one.yaml" in out and not run_dir.exists()


def test_outputs_outside_the_run_folder_are_never_removed(tmp_path: Path) -> None:
    outside = tmp_path / "precious.txt"
    outside.write_text("x")
    run_dir = tmp_path / "run"
    (run_dir / "old").mkdir(parents=True)
    step = pipeline.Step("a", ("ls",), (str(outside), str(run_dir / "old"), str(run_dir), str(run_dir / ".." / "..")))
    pipeline._remove_outputs(step, run_dir)
    assert outside.exists() and run_dir.exists() and not (run_dir / "old").exists()


def _wait_for(condition, what: str, process: subprocess.Popen | None = None) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        assert process is None or process.poll() is None, f"the pipeline ended early: {what}"
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def _start(path: str, run_dir: Path) -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen3_lit.cli.main", "pipeline", path],
        start_new_session=True,
        # A test run in the background of a shell ignores interruptions, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    _wait_for(
        lambda: (
            (run_dir / "pipeline_state.json").exists() and _state(run_dir)["steps"].get("two", {}).get("seconds", 0) > 0
        ),
        "the second step",
        process,
    )
    (child,) = _children(process.pid)
    return process, child


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are prevented by a Linux call")
def test_kill_9_leaves_no_orphan_and_the_next_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run_dir = _write(tmp_path, LONG)
    process, child = _start(path, run_dir)
    done_at = (run_dir / "one.yaml").stat().st_mtime_ns
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _wait_for(lambda: not _alive(child), "the end of the step")
    state = _state(run_dir)["steps"]
    assert state["one"]["done"] and not state["two"]["done"] and state["two"]["seconds"] > 0

    monkeypatch.setattr(pipeline, "_report", lambda *args: 0)
    Path(path).write_text(Path(path).read_text().replace("100000000", "3"))
    assert main(["pipeline", path]) == 0
    assert (run_dir / "one.yaml").stat().st_mtime_ns == done_at
    assert len((run_dir / "x.jsonl").read_text().splitlines()) == 3


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_interruption_reaches_the_step_and_gives_130(tmp_path: Path) -> None:
    path, run_dir = _write(tmp_path, LONG)
    process, child = _start(path, run_dir)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert not _alive(child)
    assert not _state(run_dir)["steps"]["two"]["done"]


@pytest.mark.parametrize(("was_told", "waited"), [(True, [5.0]), (False, [0.0])])
def test_a_termination_of_the_pipeline_alone_is_passed_on_at_once(was_told: bool, waited: list[float]) -> None:
    waits: list[float] = []
    sent: list[int] = []

    class Process:
        def wait(self, seconds: float) -> int:
            if not sent:
                waits.append(seconds)
                raise subprocess.TimeoutExpired("step", seconds)
            return 130

        send_signal = sent.append

    step = object.__new__(StepProcess)
    step.process = Process()  # type: ignore[assignment]
    step.stop(was_told=was_told)
    assert waits == waited and sent == [signal.SIGINT]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_termination_ends_the_step_and_the_pipeline(tmp_path: Path) -> None:
    path, run_dir = _write(tmp_path, LONG)
    process, child = _start(path, run_dir)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not _alive(child) and not _state(run_dir)["steps"]["two"]["done"]


def test_two_pipelines_in_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run_dir = _write(tmp_path)
    run_dir.mkdir()
    monkeypatch.setattr(pipeline, "LOCK_WAIT_SECONDS", 0.0)
    lock = pipeline._take_lock(run_dir)
    args = argparse.Namespace(file=path, first=None, only=None, dry_run=False, run_dir=None, var=[])
    with pytest.raises(UserError, match="another pipeline is running"):
        pipeline.run(args)
    os.close(lock)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_of_children_counts() -> None:
    code = "block = bytearray(200_000_000); print('ready', flush=True); input()"
    alone = tree_resident_bytes(os.getpid())
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        both = tree_resident_bytes(os.getpid())
        child.communicate(b"\n")
    assert both > alone + 150_000_000
    assert tree_resident_bytes(2**30) == 0
