"""Rewards in processes that can be killed: a hanging verifier costs one reward, never the run.

:class:`RewardPool` keeps a few long-lived interpreters, one pipe each. Every (completion, reward) pair is one job with
its own deadline. Jobs travel in chunks, results come back one by one, so the parent always knows which job runs; when
it overruns, the process gets SIGKILL, that one job gets the default reward, and the rest of its chunk goes to a fresh
process. The same holds for jobs that exhaust the memory limit, raise, or take their process down.

Why not :mod:`multiprocessing` or :mod:`concurrent.futures`: their pools cannot kill one overrunning job without
breaking the pool, and their spawn method runs the user's start script again in each child. The processes here are plain
``python -c`` children that import the rewards and nothing else; they end when the parent does, killed or not.

Rewards with ``in_process = True`` (models) are scored in the calling process, a batch at a time.
"""

import contextlib
import json
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any

from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.reward import Composition, Reward, RewardInput, check_rewards, combine_scores

log = logging.getLogger(__name__)

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from qwen3_lit.rl.rewards.worker_main import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)
_FAILURES = {"timeouts": "timeout_frac", "errors": "error_frac", "oom": "oom_frac", "crashes": "crash_frac"}


@dataclass(frozen=True)
class _Job:
    number: int
    item: int
    reward: int


@dataclass
class _Worker:
    """One child process and what it is doing."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    lifeline_fd: int
    deadline: float
    ready: bool = False
    preparing: bool = False
    running: deque[_Job] = field(default_factory=deque)


class RewardPool:
    """Scores completions with several rewards at once, each job under a deadline and a memory limit.

    Args:
        rewards: What to score with; names must differ. Rewards without `in_process` must pickle.
        num_workers: Worker processes; none is started when all rewards run in process.
        deadline_seconds: Wall-clock limit of one reward on one completion.
        memory_limit_mb: Address space of one worker, in MiB.
        default_reward: Score of a job that failed.
        max_input_chars: Texts longer than this lose their middle before they are sent.
        chunk_size: Jobs sent to a worker at a time.
        startup_seconds: Limit for starting a worker, and for a reward's `prepare`.
        composition: How :meth:`combine` forms one number; see :mod:`qwen3_lit.rl.rewards.reward`.

    Raises:
        UserError: If the rewards do not fit together or a worker cannot load them.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        num_workers: int = 2,
        deadline_seconds: float = 10.0,
        memory_limit_mb: int = 2048,
        default_reward: float = 0.0,
        max_input_chars: int = 262_144,
        chunk_size: int = 32,
        startup_seconds: float = 60.0,
        composition: Composition = "mean",
    ) -> None:
        check_rewards(rewards)
        limits = {
            "num_workers": num_workers,
            "memory_limit_mb": memory_limit_mb,
            "max_input_chars": max_input_chars,
            "chunk_size": chunk_size,
            "deadline_seconds": deadline_seconds,
            "startup_seconds": startup_seconds,
        }
        for name, value in limits.items():
            if not value > 0:
                raise UserError(f"RewardPool: {name}: {value} must be greater than 0")
        if composition not in ("mean", "sum"):
            raise UserError(f"RewardPool: composition: {composition!r} is unknown, expected 'mean' or 'sum'")
        self.rewards = list(rewards)
        self.composition: Composition = composition
        self.default_reward = float(default_reward)
        self.max_input_chars = max_input_chars
        self.totals: Counter[str] = Counter()
        """Failures and jobs since the pool was made."""
        self._before_latest: Counter[str] = Counter()
        self._deadline_seconds = deadline_seconds
        self._startup_seconds = startup_seconds
        self._chunk_size = chunk_size
        self._num_workers = num_workers
        self._settings = {
            "memory_bytes": memory_limit_mb << 20,
            "cpu_seconds": deadline_seconds,
            "startup_seconds": startup_seconds,
        }
        self._remote = [index for index, reward in enumerate(self.rewards) if not reward.in_process]
        self._payload = self._pickle_rewards()
        self._workers: list[_Worker] = []
        self._lock = threading.RLock()
        self._explained: set[tuple[str, str]] = set()
        self._prepared: set[int] = set()
        self._closed = False

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def start(self) -> None:
        """Start the worker processes now instead of at the first :meth:`score`; does not wait for them."""
        with self._lock:
            self._start_workers()

    def close(self) -> None:
        """Kill the workers. The pool cannot be used afterwards; closing twice is fine."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                _kill(worker)
            self._workers.clear()

    def score(self, inputs: Sequence[RewardInput]) -> list[dict[str, float | None]]:
        """Every reward's score of every completion, None where a reward does not apply; in the order of `inputs`."""
        with self._lock:
            self._before_latest = self.totals.copy()
            capped = [item.capped(self.max_input_chars) for item in inputs]
            scores: list[dict[str, float | None]] = [{reward.name: None for reward in self.rewards} for _ in capped]
            jobs: list[_Job] = []
            for item, value in enumerate(capped):
                for index in self._remote:
                    if self.rewards[index].applies(value):
                        jobs.append(_Job(len(jobs), item, index))
            try:
                self._run_jobs(jobs, capped, scores)
            except BaseException:
                # A worker interrupted in mid-chunk would answer the next call's jobs with this call's results.
                for worker in self._workers:
                    _kill(worker)
                self._workers.clear()
                raise
            self.totals["jobs"] += len(jobs) + self._run_in_process(capped, scores)
            return scores

    @property
    def metrics(self) -> dict[str, float]:
        """:meth:`metrics_since` the latest :meth:`score` began."""
        return self.metrics_since(self._before_latest)

    def metrics_since(self, totals: Mapping[str, int]) -> dict[str, float]:
        """Failures since :attr:`totals` had these values: totals, `<reward>/<failure>`, totals as shares of jobs."""
        new = Counter({name: count - totals.get(name, 0) for name, count in self.totals.items()})
        metrics = {name: float(new[name]) for name in _FAILURES}
        metrics |= {name: float(count) for name, count in new.items() if "/" in name and count}
        return metrics | {share: new[name] / max(new["jobs"], 1) for name, share in _FAILURES.items()}

    def combine(self, scores: dict[str, float | None]) -> float | None:
        """One number from one completion's scores, by the pool's composition; None when no weighted reward applies."""
        return combine_scores(scores, self.rewards, self.composition)

    def _pickle_rewards(self) -> bytes:
        remote = {index: self.rewards[index] for index in self._remote}
        for reward in remote.values():
            if type(reward).__module__ == "__main__":
                raise UserError(
                    f"rewards: {type(reward).__name__} is defined in the start script, which workers do not run; "
                    "move it to an importable module"
                )
            try:
                pickle.dumps(reward)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                raise UserError(f"rewards: {reward.name} cannot be sent to a worker process: {error}") from error
        return pickle.dumps(remote)

    def _start_workers(self) -> None:
        if self._closed:
            raise RuntimeError("this RewardPool is closed")
        if self._remote:
            while len(self._workers) < self._num_workers:
                self._workers.append(self._spawn())

    def _spawn(self) -> _Worker:
        parent, child = Pipe(duplex=True)
        lifeline_read, lifeline_write = os.pipe()
        # A reward is one thread of plain Python; the trainer's GPU is none of its business.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        arguments = [json.dumps(sys.path), str(child.fileno()), str(lifeline_read)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, *arguments],
                pass_fds=(child.fileno(), lifeline_read),
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        finally:
            child.close()
            os.close(lifeline_read)
        worker = _Worker(process, parent, lifeline_write, time.monotonic() + self._startup_seconds)
        # The death signal is tied to the thread that starts the child, so it only fits the one that lives longest.
        settings = {**self._settings, "die_with_parent": threading.current_thread() is threading.main_thread()}
        try:
            parent.send(settings)
            parent.send_bytes(self._payload)
        except OSError:
            log.debug("a reward worker ended before it was set up; the failure is reported when it is waited for")
        return worker

    def _run_jobs(self, jobs: list[_Job], inputs: Sequence[RewardInput], scores: list[dict[str, float | None]]) -> None:
        if not jobs:
            return
        self._start_workers()
        waiting = deque(jobs)
        # Small last chunks keep all workers busy to the end.
        chunk_size = max(1, min(self._chunk_size, math.ceil(len(jobs) / (4 * self._num_workers))))
        while waiting or any(worker.running for worker in self._workers):
            for worker in self._workers:
                if waiting and worker.ready and not worker.running:
                    self._send_chunk(worker, waiting, chunk_size, inputs)
            busy = [worker for worker in self._workers if worker.running or not worker.ready]
            timeout = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            readable = set(wait([worker.pipe for worker in busy], timeout))
            for worker in busy:
                if worker.pipe in readable:
                    self._receive(worker, waiting, scores)
                elif time.monotonic() >= worker.deadline:
                    self._give_up(worker, "timeouts", waiting, scores)

    def _send_chunk(
        self, worker: _Worker, waiting: deque[_Job], chunk_size: int, inputs: Sequence[RewardInput]
    ) -> None:
        worker.running = deque(waiting.popleft() for _ in range(min(chunk_size, len(waiting))))
        worker.deadline = time.monotonic() + self._deadline_seconds
        try:
            worker.pipe.send([(job.number, job.reward, inputs[job.item]) for job in worker.running])
        except OSError:
            # Found dead while idle: no job is to blame.
            waiting.extendleft(reversed(worker.running))
            self._replace(worker)

    def _receive(self, worker: _Worker, waiting: deque[_Job], scores: list[dict[str, float | None]]) -> None:
        """Take every message that has arrived from one worker."""
        try:
            while True:
                kind, *content = worker.pipe.recv()
                now = time.monotonic()
                if kind == "failed":
                    raise UserError(f"rewards: a worker process could not load the rewards: {content[0]}")
                if kind == "ready":
                    worker.ready = True
                    if content[0]:
                        self._explain_once("worker", "limits", content[0])
                elif kind in ("preparing", "prepared"):
                    worker.preparing = kind == "preparing"
                    worker.deadline = now + (self._startup_seconds if worker.preparing else self._deadline_seconds)
                else:
                    job = worker.running.popleft()
                    if job.number != content[0]:
                        raise RuntimeError(f"reward worker answered job {content[0]} instead of {job.number}")
                    worker.preparing = False
                    worker.deadline = now + self._deadline_seconds
                    if kind == "value":
                        scores[job.item][self.rewards[job.reward].name] = content[1]
                    else:
                        self._default(job, "oom" if kind == "memory" else "errors", content[1], scores)
                    if kind == "memory":
                        # Its address space stays fragmented: later jobs would fail without being at fault.
                        waiting.extendleft(reversed(worker.running))
                        self._replace(worker)
                        return
                if not worker.pipe.poll():
                    return
        except (EOFError, OSError, pickle.UnpicklingError):
            self._give_up(worker, "crashes", waiting, scores)

    def _give_up(
        self, worker: _Worker, failure: str, waiting: deque[_Job], scores: list[dict[str, float | None]]
    ) -> None:
        """Kill a worker that overran or died; its current job gets the default, its other jobs wait again."""
        if not worker.ready:
            code = _kill(worker, grace_seconds=0.0 if failure == "timeouts" else 2.0)
            self._workers.remove(worker)
            what = f"did not start within {self._startup_seconds:g} s" if failure == "timeouts" else f"exit code {code}"
            raise UserError(
                f"rewards: a worker process failed at start ({what}); see its output above, or raise "
                "memory_limit_mb or startup_seconds"
            )
        code = self._replace(worker, grace_seconds=0.0 if failure == "timeouts" else 2.0)
        if worker.running:
            job = worker.running.popleft()
            # SIGXCPU: the CPU limit noticed the overrun before the deadline did.
            overran = failure == "timeouts" or code == -signal.SIGXCPU
            limit = self._startup_seconds if worker.preparing else self._deadline_seconds
            text = f"no score within {limit:g} s" if overran else f"worker ended with exit code {code}"
            self._default(job, "timeouts" if overran else "crashes", text, scores)
            waiting.extendleft(reversed(worker.running))

    def _replace(self, worker: _Worker, grace_seconds: float = 0.0) -> int:
        code = _kill(worker, grace_seconds)
        self._workers[self._workers.index(worker)] = self._spawn()
        return code

    def _default(self, job: _Job, failure: str, text: str, scores: list[dict[str, float | None]]) -> None:
        name = self.rewards[job.reward].name
        scores[job.item][name] = self.default_reward
        self.totals[failure] += 1
        self.totals[f"{name}/{failure}"] += 1
        self._explain_once(name, failure, text)

    def _explain_once(self, name: str, kind: str, text: str) -> None:
        if (name, kind) not in self._explained:
            self._explained.add((name, kind))
            log.warning("reward %s: %s: %s (counted in the metrics, not reported again)", name, kind, text)

    def _run_in_process(self, inputs: Sequence[RewardInput], scores: list[dict[str, float | None]]) -> int:
        count = 0
        for index, reward in enumerate(self.rewards):
            if not reward.in_process:
                continue
            chosen = [item for item, value in enumerate(inputs) if reward.applies(value)]
            if not chosen:
                continue
            if index not in self._prepared:
                reward.prepare()
                self._prepared.add(index)
            values = reward.score_batch([inputs[item] for item in chosen])
            for item, value in zip(chosen, values, strict=True):
                if value is not None and not math.isfinite(value):
                    self._default(_Job(-1, item, index), "errors", f"the score is {value}", scores)
                else:
                    scores[item][reward.name] = value
            count += len(chosen)
        return count

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a RewardPool owns processes and cannot be pickled")


def _kill(worker: _Worker, grace_seconds: float = 0.0) -> int:
    """End a worker and reap it, so that no zombie is left; returns its exit code.

    `grace_seconds` lets a process that is already ending finish, so that its own exit code is seen.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.process.wait(grace_seconds)
    worker.process.kill()
    code = worker.process.wait()
    worker.pipe.close()
    os.close(worker.lifeline_fd)
    return code
