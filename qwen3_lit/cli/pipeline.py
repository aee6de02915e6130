"""``qwen3-lit pipeline``: run the steps of a pipeline file in order, each as a process of its own, and survive kills.

``<run_dir>/pipeline_state.json`` records, for every step, a fingerprint of what it does, whether it is done, the
seconds it took over all its starts, and the peak memory of its process tree. The same command started again skips what
is done and lets the interrupted step continue. A step whose definition or recipe changed starts clean, and so do all
steps after it. A lock, which the running step inherits, keeps two pipelines out of one folder.
"""

import argparse
import fcntl
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qwen3_lit.cli.pipeline_file import PipelineFile, Step, read_pipeline
from qwen3_lit.cli.process_memory import PeakMemory
from qwen3_lit.errors import UserError

HELP = "Run the steps of a pipeline file in order. The same command again continues where it stopped, even killed."
LOCK_WAIT_SECONDS = 20.0
RECORD_EVERY_SECONDS = 2.0

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("file", help="pipeline file or short name, such as pipelines/nano")
    parser.add_argument("--from", dest="first", metavar="STEP", help="run this step and all later ones again")
    parser.add_argument("--only", metavar="STEP", help="run this step again and no other")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and what is done; run nothing")
    parser.add_argument("--run-dir", help="write to this folder instead of the file's run_dir")
    parser.add_argument("--var", action="append", default=[], metavar="NAME=VALUE", help="override a variable")


class PipelineState:
    """The recorded progress of one run folder; written atomically."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "pipeline_state.json"
        self.steps: dict[str, dict[str, Any]] = {}
        self.forced: dict[str, Any] = {}
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                self.steps, self.forced = content["steps"], content["forced"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{self.path}: not a pipeline state ({error}); delete it to start anew") from error

    def write(self) -> None:
        """Replace the file."""
        content = {
            "total_seconds": round(sum(step["seconds"] for step in self.steps.values()), 1),
            "peak_rss_gb": max((step["peak_rss_gb"] for step in self.steps.values()), default=0.0),
            "steps": self.steps,
            "forced": self.forced,
        }
        half = self.path.with_suffix(".json.half")
        half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(half, self.path)

    def is_done(self, step: Step, fingerprint: str) -> bool:
        """Whether the step ran to its end as it is defined now."""
        entry = self.steps.get(step.name)
        return bool(entry and entry["done"] and entry["hash"] == fingerprint)


def _take_lock(folder: Path) -> int:
    """Lock the run folder, waiting a little for a killed run's last process to end; returns the descriptor."""
    descriptor = os.open(folder / ".pipeline.lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                message = f"{folder}: another pipeline is running in this folder; wait for it or stop it"
                raise UserError(message) from None
            time.sleep(0.2)


def _remove_outputs(step: Step, run_dir: Path) -> None:
    """Remove what an earlier definition of the step wrote, only inside the run folder."""
    root = run_dir.resolve()
    for name in step.outputs:
        path = Path(name)
        if root not in path.resolve().parents or not path.exists():
            continue
        log.info("%s: removing %s, written by an earlier definition of this step", step.name, path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _stop(process: subprocess.Popen[bytes], was_told: bool) -> None:
    """Interrupt a step and wait for its end; Ctrl-C in a terminal has told it already."""
    first = 5.0 if was_told else 0.0
    for wait_seconds, signal_number in ((first, signal.SIGINT), (15.0, signal.SIGTERM), (5.0, signal.SIGKILL)):
        try:
            process.wait(wait_seconds)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(signal_number)
    process.wait()


def _run_process(arguments: tuple[str, ...], entry: dict[str, Any], state: PipelineState, lock: int) -> int:
    """Run one command with the terminal handed through; keeps its seconds and memory in the state as it goes."""
    command = [sys.executable, "-m", "qwen3_lit.cli.main", *arguments]
    seconds_before, peak_before = entry["seconds"], entry["peak_rss_gb"]
    memory = PeakMemory().start()
    start = time.monotonic()

    def record() -> None:
        entry["seconds"] = round(seconds_before + time.monotonic() - start, 2)
        entry["peak_rss_gb"] = max(peak_before, memory.peak_gb)
        state.write()

    environment = {**os.environ, "QWEN3_LIT_PARENT_PID": str(os.getpid())}
    process = subprocess.Popen(command, pass_fds=[lock], env=environment)
    try:
        while True:
            try:
                return process.wait(RECORD_EVERY_SECONDS)
            except subprocess.TimeoutExpired:
                record()
    except BaseException as error:
        _stop(process, was_told=isinstance(error, KeyboardInterrupt))
        raise
    finally:
        memory.sample()
        memory.stop()
        record()


def _selection(args: argparse.Namespace, pipeline: PipelineFile) -> tuple[str, list[str]]:
    """The option that forces steps, and their names."""
    names = [step.name for step in pipeline.steps]
    for option, wanted in (("--from", args.first), ("--only", args.only)):
        if wanted is not None and wanted not in names:
            raise UserError(f"{option} {wanted}: {pipeline.path} has no such step; steps: {', '.join(names)}")
    if args.first is not None and args.only is not None:
        raise UserError("--from and --only exclude each other; give one of them")
    if args.first is not None:
        return f"--from {args.first}", names[names.index(args.first) :]
    if args.only is not None:
        return f"--only {args.only}", [args.only]
    return "", []


def _fingerprints(pipeline: PipelineFile) -> dict[str, str]:
    found, before = {}, ""
    for step in pipeline.steps:
        before = found[step.name] = step.fingerprint(before)
    return found


def _parse_variables(pairs: list[str]) -> dict[str, Any]:
    import yaml

    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--var {pair}: expected NAME=VALUE")
        found[name] = yaml.safe_load(value)
    return found


def _dry_run(pipeline: PipelineFile, state: PipelineState, prints: dict[str, str], forced: list[str]) -> None:
    for step in pipeline.steps:
        done = state.is_done(step, prints[step.name]) and step.name not in forced
        print(f"{'done' if done else 'run ':<5}{step.name}: qwen3-lit {shlex.join(step.arguments)}")
    print(f"run  report: qwen3-lit report {pipeline.run_dir}")


def run(args: argparse.Namespace) -> int:
    """Run the pipeline; returns 0, or the exit code of the step that failed."""
    pipeline = read_pipeline(args.file, args.run_dir, _parse_variables(args.var))
    option, names = _selection(args, pipeline)
    prints = _fingerprints(pipeline)
    if args.dry_run:
        _dry_run(pipeline, PipelineState(pipeline.run_dir), prints, names)
        return 0
    pipeline.run_dir.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(pipeline.run_dir)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _run_locked(args, pipeline, option, names, prints, lock)
    finally:
        signal.signal(signal.SIGTERM, previous)
        os.close(lock)


def _run_locked(
    args: argparse.Namespace, pipeline: PipelineFile, option: str, names: list[str], prints: dict[str, str], lock: int
) -> int:
    state = PipelineState(pipeline.run_dir)
    if option and state.forced.get("option") != option:
        # An interrupted --from or --only is continued by the same command, not begun again.
        state.forced = {"option": option, "pending": names}
        state.write()
    elif not option:
        state.forced = {}
    for index, step in enumerate(pipeline.steps):
        if args.only is not None and step.name != args.only:
            continue
        pending = state.forced.get("pending", [])
        title = f"[{index + 1}/{len(pipeline.steps)}] {step.name}"
        if state.is_done(step, prints[step.name]) and step.name not in pending:
            print(f"{title}: done, {state.steps[step.name]['seconds']:.0f} s")
            continue
        entry = state.steps.get(step.name)
        if entry is None or entry["hash"] != prints[step.name] or step.name in pending:
            _remove_outputs(step, pipeline.run_dir)
            entry = {"hash": prints[step.name], "done": False, "seconds": 0.0, "peak_rss_gb": 0.0}
            state.steps[step.name] = entry
            if step.name in pending:
                pending.remove(step.name)
            state.write()
        print(f"{title}\n$ qwen3-lit {shlex.join(step.arguments)}", flush=True)
        code = _run_process(step.arguments, entry, state, lock)
        if code != 0:
            return _failed(step, code)
        entry["done"] = True
        state.write()
    state.steps = {step.name: state.steps[step.name] for step in pipeline.steps if step.name in state.steps}
    state.forced = {}
    state.write()
    return _report(pipeline, lock, state)


def _failed(step: Step, code: int) -> int:
    if code in (-signal.SIGINT, 130):
        raise KeyboardInterrupt
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    print(f"qwen3-lit pipeline: step {step.name} {how}; mend it and run the same command to continue", file=sys.stderr)
    return 128 - code if code < 0 else code


def _report(pipeline: PipelineFile, lock: int, state: PipelineState) -> int:
    print(f"$ qwen3-lit report {pipeline.run_dir}", flush=True)
    entry = {"seconds": 0.0, "peak_rss_gb": 0.0}
    code = _run_process(("report", str(pipeline.run_dir)), entry, state, lock)
    total = sum(step["seconds"] for step in state.steps.values())
    peak = max((step["peak_rss_gb"] for step in state.steps.values()), default=0.0)
    print(f"{pipeline.run_dir}: {len(state.steps)} steps, {total:.0f} s, peak memory {peak:.2f} GB")
    return code
