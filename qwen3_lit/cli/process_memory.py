"""Peak memory of a tree of processes: the sum of resident sizes, sampled twice a second from /proc.

Pages that two processes share are counted in each, so the figure is an upper bound. Without /proc (macOS) the peak of
the largest finished child is used instead, and ``source`` says so.
"""

import os
import resource
import sys
import threading
from pathlib import Path

_PROC = Path("/proc")


def _parents() -> dict[int, int]:
    found = {}
    for entry in os.listdir(_PROC):
        if entry.isdigit():
            try:
                stat = (_PROC / entry / "stat").read_text()
            except OSError:  # the process ended between the listing and the reading
                continue
            found[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    return found


def tree_resident_bytes(root: int) -> int:
    """Resident bytes of a process and all its descendants; 0 for a process that is gone."""
    parents = _parents()
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    page = os.sysconf("SC_PAGE_SIZE")
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        try:
            total += int((_PROC / str(pid) / "statm").read_text().split()[1]) * page
        except OSError:
            continue
    return total


class PeakMemory:
    """Samples this process and its descendants in a thread between start() and stop()."""

    def __init__(self, interval_seconds: float = 0.5) -> None:
        self.interval_seconds = interval_seconds
        self.peak_bytes = 0
        self.source = "sum of resident sizes of the process tree" if _PROC.is_dir() else "largest finished child"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(self.interval_seconds):
            self.sample()

    def sample(self) -> None:
        """Take one sample now."""
        if _PROC.is_dir():
            now = tree_resident_bytes(os.getpid())
        else:
            now = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.peak_bytes = max(self.peak_bytes, now)

    def start(self) -> "PeakMemory":
        """Begin to sample."""
        self._thread.start()
        return self

    def stop(self) -> int:
        """End and return the peak in bytes."""
        self._stop.set()
        self._thread.join()
        return self.peak_bytes

    @property
    def peak_gb(self) -> float:
        """The peak so far in GB (10^9 bytes), rounded to MB."""
        return round(self.peak_bytes / 1e9, 3)
