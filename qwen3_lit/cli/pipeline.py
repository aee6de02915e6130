"""``qwen3-lit pipeline``: run the steps of a pipeline file, each as a process of its own, and survive kills.

Steps run in order. A step with ``beside: true`` runs next to them, one at a time, as early as what it needs is done,
and its output goes to ``<run_dir>/logs``; a step waits for the earlier ones whose outputs it names. The same command
started again skips what is done (``pipeline_state``) and lets the interrupted steps continue. A step whose definition
or recipe changed starts clean, and so do all steps after it. A lock, which running steps inherit, keeps two pipelines
out of one folder.
"""

import argparse
import fcntl
import logging
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from qwen3_lit.cli.pipeline_file import PipelineFile, Step, read_pipeline
from qwen3_lit.cli.pipeline_state import PipelineState
from qwen3_lit.cli.process_memory import tree_resident_gb
from qwen3_lit.cli.step_process import StepProcess
from qwen3_lit.errors import UserError

HELP = "Run the steps of a pipeline file. The same command again continues where it stopped, even killed."
LOCK_WAIT_SECONDS = 20.0
POLL_SECONDS, MEASURE_SECONDS, WRITE_SECONDS = 0.05, 0.5, 2.0
LOG_LINES_OF_A_FAILURE = 20

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("file", help="pipeline file or short name, such as pipelines/nano")
    parser.add_argument("--from", dest="first", metavar="STEP", help="run this step and all later ones again")
    parser.add_argument("--only", metavar="STEP", help="run this step again and no other")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and what is done; run nothing")
    parser.add_argument("--run-dir", help="write to this folder instead of the file's run_dir")
    parser.add_argument("--var", action="append", default=[], metavar="NAME=VALUE", help="override a variable")


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
    steps = [step for step in pipeline.steps if args.only in (None, step.name)]
    code = _Scheduler(pipeline, state, prints, lock).run(steps)
    if code != 0:
        return code
    state.steps = {step.name: state.steps[step.name] for step in pipeline.steps if step.name in state.steps}
    state.forced = {}
    state.write()
    return _report(pipeline, lock, state)


class _Scheduler:
    """Runs steps in two lanes: one in order, one beside it."""

    def __init__(self, pipeline: PipelineFile, state: PipelineState, prints: dict[str, str], lock: int) -> None:
        self.pipeline, self.state, self.prints, self.lock = pipeline, state, prints, lock
        self.waiting: list[Step] = []
        self.running: dict[bool, tuple[Step, StepProcess]] = {}  # by whether it runs beside
        self.ticked = self.measured = self.written = time.monotonic()

    def run(self, steps: list[Step]) -> int:
        """0 when all steps are done, or the exit code of the first that failed; the others are stopped then."""
        pending = self.state.forced.get("pending", [])
        for step in steps:
            if self.state.is_done(step, self.prints[step.name]) and step.name not in pending:
                print(f"{self._title(step)}: done, {self.state.steps[step.name]['seconds']:.0f} s")
            else:
                self.waiting.append(step)
        was_told = False
        try:
            self._start_what_can()
            while self.running:
                time.sleep(POLL_SECONDS)
                self._tick()
                for beside, (step, process) in list(self.running.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    self._ended(beside, step, process, code)
                    if code != 0:
                        return _failed(step, process, code)
                    self._start_what_can()
            return 0
        except KeyboardInterrupt:
            was_told = True
            raise
        finally:
            for _, process in self.running.values():
                process.stop(was_told=was_told)
                process.measure()
            self.state.write()

    def _title(self, step: Step) -> str:
        return f"[{self.pipeline.steps.index(step) + 1}/{len(self.pipeline.steps)}] {step.name}"

    def _start_what_can(self) -> None:
        in_order_is_free = False not in self.running
        for step in list(self.waiting):
            if True in self.running if step.beside else not in_order_is_free:
                continue
            if not any(step.needs(other) for other in self._unfinished_before(step)):
                self._start(step)
            in_order_is_free &= step.beside  # started or not, it is this one's turn

    def _unfinished_before(self, step: Step) -> list[Step]:
        unfinished = [*self.waiting, *(other for other, _ in self.running.values())]
        place = self.pipeline.steps.index
        return [other for other in unfinished if place(other) < place(step)]

    def _start(self, step: Step) -> None:
        state, pending = self.state, self.state.forced.get("pending", [])
        entry = state.steps.get(step.name)
        if entry is None or entry["hash"] != self.prints[step.name] or step.name in pending:
            _remove_outputs(step, self.pipeline.run_dir)
            state.begin(step, self.prints[step.name])
            if step.name in pending:
                pending.remove(step.name)
            state.write()
        log_file = self.pipeline.run_dir / "logs" / f"{step.name}.log" if step.beside else None
        where = f", beside the others; its output goes to {log_file}" if log_file else ""
        print(f"{self._title(step)}{where}\n$ qwen3-lit {shlex.join(step.arguments)}", flush=True)
        process = StepProcess(step.arguments, state.steps[step.name], self.lock, log_file)
        self.waiting.remove(step)
        self.running[step.beside] = (step, process)

    def _ended(self, beside: bool, step: Step, process: StepProcess, code: int) -> None:
        self._measure()
        del self.running[beside]
        process.figures["done"] = code == 0
        self.state.write()
        if beside and code == 0:
            print(f"{self._title(step)}: done, {process.figures['seconds']:.0f} s", flush=True)

    def _measure(self) -> None:
        for _, process in self.running.values():
            process.measure()
        self.state.peak_rss_gb = max(self.state.peak_rss_gb, tree_resident_gb(os.getpid()))

    def _tick(self) -> None:
        """Time since the last tick goes to the step in front, or to the one beside where none is."""
        now = time.monotonic()
        front = self.running.get(False) or self.running.get(True)
        if front is not None:
            figures = front[1].figures
            figures["wall_seconds"] = round(figures["wall_seconds"] + now - self.ticked, 4)
        self.ticked = now
        if now > self.measured + MEASURE_SECONDS:
            self.measured = now
            self._measure()
        if now > self.written + WRITE_SECONDS:
            self.written = now
            self.state.write()


def _failed(step: Step, process: StepProcess, code: int) -> int:
    if code in (-signal.SIGINT, 130):
        raise KeyboardInterrupt
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if process.log_file is not None:
        lines = process.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_OF_A_FAILURE:]
        print("\n".join([f"last lines of {process.log_file}:", *lines]), file=sys.stderr)
    print(f"qwen3-lit pipeline: step {step.name} {how}; mend it and run the same command to continue", file=sys.stderr)
    return 128 - code if code < 0 else code


def _report(pipeline: PipelineFile, lock: int, state: PipelineState) -> int:
    print(f"$ qwen3-lit report {pipeline.run_dir}", flush=True)
    process = StepProcess(("report", str(pipeline.run_dir)), {"seconds": 0.0, "peak_rss_gb": 0.0}, lock)
    try:
        code = process.process.wait()
    except BaseException as error:
        process.stop(was_told=isinstance(error, KeyboardInterrupt))
        raise
    peak = state.peak_rss_gb
    print(f"{pipeline.run_dir}: {len(state.steps)} steps, {state.total_seconds:.0f} s, peak memory {peak:.2f} GB")
    return code
