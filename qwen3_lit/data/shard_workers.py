"""Runs one function over many jobs in spawned processes and yields the results in the order of the jobs.

Differs from ``concurrent.futures`` alone in what a long preparation needs: jobs are taken lazily (a few in flight, so
the caller can stop early), workers end when the parent is killed (they would wait on their queue for ever), and Ctrl-C
reaches the parent only. With one worker everything runs in the calling process.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from qwen3_lit.errors import UserError


class WorkerKilledError(UserError):
    """A worker process died from outside; what is done so far is sound."""


class ShardWorkers:
    """A context manager; ``initializer(*initargs)`` runs once in each process that does work."""

    def __init__(self, workers: int, initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
        if workers < 1:
            raise UserError(f"workers: got {workers}, expected 1 or more")
        self._workers = workers
        self._initializer = initializer
        self._initargs = initargs
        self._pool: ProcessPoolExecutor | None = None
        self._ready_here = False

    def __enter__(self) -> ShardWorkers:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=kind is None, cancel_futures=True)
            if kind is not None:
                for process in processes:
                    process.terminate()

    def imap(
        self, function: Callable[..., Any], jobs: Iterator[tuple[Any, ...]], in_process: bool = False
    ) -> Iterator[Any]:
        """``function(*job)`` for each job, in order. Raises ``UserError`` when a worker dies."""
        if in_process or self._workers == 1:
            if not self._ready_here:
                self._initializer(*self._initargs)
                self._ready_here = True
            for job in jobs:
                yield function(*job)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self._initializer, self._initargs),
            )
        flying: deque[Future[Any]] = deque()
        try:
            for job in jobs:
                flying.append(self._pool.submit(function, *job))
                if len(flying) > 2 * self._workers:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        except BrokenProcessPool:
            raise WorkerKilledError(
                "a worker process was killed, most likely for want of memory; run the same command again with fewer "
                "--workers (finished shards are kept)"
            ) from None
        finally:
            for future in flying:
                future.cancel()


def _start(initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Processes already use every core; threads inside the tokenizer would only fight over them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*initargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
