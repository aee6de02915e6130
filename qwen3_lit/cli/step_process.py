"""One running step of a pipeline: its process, the seconds and memory it takes, and its end by force."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qwen3_lit.cli.process_memory import tree_resident_gb


class StepProcess:
    """A ``qwen3-lit`` command under way; ``figures`` takes what it costs.

    Args:
        arguments: what follows ``qwen3-lit``.
        figures: ``seconds`` and ``peak_rss_gb`` are raised by what this process takes.
        lock: descriptor that the process inherits, so that the run folder stays locked until it has ended.
        log_file: takes the output, appended; None hands the terminal through.
    """

    def __init__(
        self, arguments: tuple[str, ...], figures: dict[str, Any], lock: int, log_file: Path | None = None
    ) -> None:
        self.figures, self.log_file = figures, log_file
        self._seconds_before = figures["seconds"]
        command = [sys.executable, "-m", "qwen3_lit.cli.main", *arguments]
        environment = {**os.environ, "QWEN3_LIT_PARENT_PID": str(os.getpid())}
        self._start = time.monotonic()
        if log_file is None:
            self.process = subprocess.Popen(command, pass_fds=[lock], env=environment)
            return
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as output:
            self.process = subprocess.Popen(
                command, pass_fds=[lock], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.poll()

    def measure(self) -> None:
        """Bring the figures up to date."""
        self.figures["seconds"] = round(self._seconds_before + time.monotonic() - self._start, 2)
        self.figures["peak_rss_gb"] = max(self.figures["peak_rss_gb"], tree_resident_gb(self.process.pid))

    def stop(self, *, was_told: bool) -> None:
        """Interrupt the process and wait for its end; Ctrl-C in a terminal has told it already."""
        first = 5.0 if was_told else 0.0
        for wait_seconds, signal_number in ((first, signal.SIGINT), (15.0, signal.SIGTERM), (5.0, signal.SIGKILL)):
            try:
                self.process.wait(wait_seconds)
                return
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal_number)
        self.process.wait()
