"""Memory of a tree of processes: the sum of resident sizes, read from /proc.

Pages that two processes share are counted in each, so the figure is an upper bound. Without /proc (macOS) the peak of
the largest finished child stands for it.
"""

import os
import resource
import sys
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


def tree_resident_gb(root: int) -> float:
    """What a process and its descendants take now, in GB (10^9 bytes), rounded to MB."""
    if _PROC.is_dir():
        in_bytes = tree_resident_bytes(root)
    else:
        in_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round(in_bytes / 1e9, 3)
