"""A run that was killed and started again ends like one that never was: bit for bit, on the CPU.

Compared are all rows of ``metrics.jsonl`` without the times, the whole last checkpoint (weights, optimizer, random
streams), the exported weights and the figures of ``phase.json``. Every run is killed three times: at two drawn moments
inside the process, which the same seed draws again, and once from outside, at any machine instruction.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

SEED = 2
"""Draws steps and moments; every other number must do as well."""
TRAINING_MOMENTS = ("gradient", "half a checkpoint", "two checkpoints", "unlogged", "half a row")
FINAL_MOMENTS = ("evaluation", "export")


@dataclass(frozen=True)
class Case:
    """A module's recipe, its optimizer steps, and how many of them lie between two checkpoints; None saves by a clock
    that is always due."""

    recipe: str
    steps: int
    every: int | None
    settings: dict[str, Any]
    exercised: Callable[[dict[str, Any]], bool] = lambda outcome: True
    """Whether the run used what it is here for."""


CASES = {
    "PretrainModule": Case("1_pretrain_general", 5, 3, {"trainer.val_check_interval": 4}),
    "ColdStartSFTModule": Case("4_cold_start_sft", 5, None, {"trainer.accumulate_grad_batches": 2}),
    "GRPOModule": Case(
        "5_reasoning_rl",
        8,
        4,
        {
            "model.init_args.num_minibatches": 2,
            "model.init_args.group_size": 4,
            "model.init_args.sampling": {"max_new_tokens": 16},
            "model.init_args.mask_truncated": False,
            "model.init_args.dynamic_sampling.max_refills": 1,
            # a random model never answers right, but now and then it stops early; and its entropy is near ln 384
            "model.init_args.rewards": [
                {"class_path": "MathAnswerReward"},
                {"class_path": "LengthReward", "init_args": {"max_tokens": 16, "cache_tokens": 16}},
            ],
            "model.init_args.policy_loss.init_args.entropy_bonus.init_args.target": 10.0,
        },
        # groups without signal were replaced, and the entropy bonus rose
        lambda outcome: (
            outcome["/checkpoint/phase/groups_sampled"] > 4 * 2
            and outcome["/checkpoint/phase/entropy_bonus/value"] > 0
            and any(name.endswith("train/grad_norm") and value > 0 for name, value in outcome.items())
        ),
    ),
    "DistillModule": Case("9_distill_on_policy", 4, 2, {}),
    "RewardModule": Case("reward_model", 5, 2, {}),
}


class RunServer:
    """The other end of run_server.py."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("run_server.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._running: int | None = None

    def start(self, argv: list[str], log: Path, kill: tuple[str, int] | None = None) -> int:
        """Start a command; its process id."""
        assert self._process.stdin is not None
        if self._running is not None:  # of a test that failed
            os.kill(self._running, signal.SIGKILL)
            self.code()
        self._process.stdin.write(json.dumps({"argv": argv, "log": str(log), "kill": kill}) + "\n")
        self._running = self._number()
        return self._running

    def code(self) -> int:
        """Wait for the command's end; its exit code, minus the signal that killed it."""
        code = self._number()
        self._running = None
        return code

    def _number(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"run_server.py ended with code {self._process.wait()}"
        return int(line)

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[RunServer]:
    made = RunServer()
    yield made
    made.close()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what the clock decides; a half-written last line is none."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            rows.append({k: v for k, v in row.items() if k != "seconds" and not k.startswith("throughput/")})
    return rows


def outcome(folder: Path) -> dict[str, Any]:
    """What has to be equal, as one flat dictionary."""
    (last,) = (folder / "checkpoints").glob("step=*.ckpt")
    assert (folder / "checkpoints" / "last.ckpt").resolve() == last.resolve()
    content = torch.load(last, weights_only=False)
    content["phase"]["counters"].pop("rollout_seconds")
    kept = {key: content[key] for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "phase")}
    record = json.loads((folder / "phase.json").read_text())
    figures = {key: record[key] for key in ("before", "after", "steps", "tokens", "rollout_tokens")}
    weights = {path.name: path.read_bytes() for path in (folder / "hf").glob("*.safetensors")}
    assert weights
    return dict(flat({"rows": rows_of(folder), "checkpoint": kept, "figures": figures, "weights": weights}))


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        yield f"{name}/length", len(value)
        for index, item in enumerate(value):
            yield from flat(item, f"{name}/{index}")
    else:
        yield name, value


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return bool(type(a) is type(b) and (a == b or a != a and b != b))

    names = [*one, *(name for name in two if name not in one)]
    different = [name for name in names if name not in one or name not in two or not equal(one[name], two[name])]
    return [f"{name}: {str(one.get(name))[:60]} | {str(two.get(name))[:60]}" for name in different]


def kill_from_outside(process: int, metrics: Path, step: int, delay: float) -> None:
    """SIGKILL ``delay`` seconds after the process logged ``step`` or a later one, unless it ends before."""
    started = time.time_ns()
    while Path(f"/proc/{process}").exists():
        logged = metrics.is_file() and metrics.stat().st_mtime_ns > started
        if logged and any(row["step"] >= step for row in rows_of(metrics.parent)):
            break
        time.sleep(0.01)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("module", CASES)
def test_a_killed_run_ends_like_one_that_was_not(module: str, small: Any, server: RunServer, tmp_path: Path) -> None:
    case = CASES[module]
    rng = random.Random(f"{SEED} {module}")
    log = tmp_path / "log.txt"

    def argv(name: str) -> list[str]:
        settings = {
            "trainer.max_steps": case.steps,
            "checkpoint.every_n_train_steps": case.every,
            "checkpoint.train_time_interval": None if case.every else "0:00:00.000001",
            **case.settings,
        }
        return small.arguments(case.recipe, tmp_path / name, **settings)

    server.start(argv("whole"), log)
    assert server.code() == 0, log.read_text()
    whole = outcome(tmp_path / "whole")
    assert case.exercised(whole)

    # Killed inside, killed from outside, killed inside again, at the end perhaps, and left alone.
    story = [f"seed {SEED}"]
    for moments in (TRAINING_MOMENTS, TRAINING_MOMENTS + FINAL_MOMENTS):
        kill = rng.choice(moments), rng.randrange(1, case.steps)
        story.append(f"killed at {kill[0]!r}, {kill[1]} steps or more done")
        server.start(argv("killed"), log, kill)
        code = server.code()
        assert code in (0, -signal.SIGKILL) and (code or len(story) > 2), f"{story}: {code}\n{log.read_text()}"
        if moments is TRAINING_MOMENTS:
            step, delay = rng.randrange(case.steps), rng.random()
            story.append(f"killed from outside {delay:.2f} s after step {step} was logged")
            process = server.start(argv("killed"), log)
            kill_from_outside(process, tmp_path / "killed" / "metrics.jsonl", step, delay)
            assert server.code() in (0, -signal.SIGKILL), f"{story}\n{log.read_text()}"
    server.start(argv("killed"), log)
    assert server.code() == 0, f"{story}\n{log.read_text()}"
    found = differences(whole, outcome(tmp_path / "killed"))
    assert not found, "\n".join([*story, f"{len(found)} of {len(whole)} values differ (whole | killed):", *found[:20]])


def test_a_run_that_was_made_longer_ends_like_a_long_one(small: Any, server: RunServer, tmp_path: Path) -> None:
    outcomes = []
    for name, ends in (("whole", (4,)), ("longer", (1, 3, 4))):
        for end in ends:
            settings = {"trainer.max_steps": end, "model.init_args.schedule.total_steps": 4}
            server.start(small.arguments("1_pretrain_general", tmp_path / name, **settings), tmp_path / "log.txt")
            assert server.code() == 0, (tmp_path / "log.txt").read_text()
        outcomes.append(outcome(tmp_path / name))
    assert not differences(*outcomes)
