"""What runs inside a reward worker process: limits, then one score after the other.

Started by :mod:`qwen3_lit.rl.rewards.workers` as its own interpreter, so that neither the trainer's memory nor its
start script is inherited. Imports the standard library only; rewards bring what they need themselves.

Protocol over one duplex pipe. In: the settings, the rewards by index, then chunks ``[(job, reward_index, item)]``;
``None`` ends the process. Out: ``("ready", notes)`` or ``("failed", text)`` once; then for each job in order
``("value", job, float | None)``, ``("error", job, text)`` or ``("memory", job, text)``. A reward's first job in the
process is announced by ``("preparing", job, "")`` and ``("prepared", job, "")``: the parent does not charge the time
between them to the job.
"""

import contextlib
import ctypes
import math
import os
import resource
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1


def main(pipe_fd: int, lifeline_fd: int) -> None:
    """Serve until the parent closes the pipe, sends None, or dies."""
    threading.Thread(target=_exit_with_parent, args=(lifeline_fd,), daemon=True).start()
    # Ctrl-C reaches the whole process group; the parent decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(pipe_fd)
    try:
        settings = pipe.recv()
        rewards = pipe.recv()
    except EOFError:
        return
    except BaseException as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
        return
    pipe.send(("ready", _apply_limits(settings)))
    prepared: set[int] = set()
    with contextlib.suppress(EOFError, OSError):
        while (chunk := pipe.recv()) is not None:
            for job, index, item in chunk:
                _renew_cpu_limit(settings["startup_seconds"] if index not in prepared else settings["cpu_seconds"])
                pipe.send(_score(pipe, rewards[index], index, prepared, job, item))


def _score(pipe: Connection, reward: Any, index: int, prepared: set[int], job: int, item: Any) -> tuple[Any, ...]:
    # Given back in the handler: reporting an exhausted address space needs some of it.
    reserve: bytearray | None = bytearray(1 << 20)
    try:
        if index not in prepared:
            pipe.send(("preparing", job, ""))
            reward.prepare()
            prepared.add(index)
            pipe.send(("prepared", job, ""))
        value = reward(item)
        if value is None:
            return ("value", job, None)
        number = float(value)
        if not math.isfinite(number):
            return ("error", job, f"the score is {number}")
        return ("value", job, number)
    except MemoryError:
        reserve = None
        return ("memory", job, "MemoryError")
    except BaseException as error:
        reserve = None
        return ("error", job, f"{type(error).__name__}: {error}"[:500])
    finally:
        del reserve


def _apply_limits(settings: dict[str, Any]) -> str:
    """Set what the platform allows; the text says what it does not."""
    notes = []
    limits = {
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_AS": (settings["memory_bytes"], settings["memory_bytes"]),
    }
    for name, values in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), values)
        except (OSError, ValueError) as error:
            notes.append(f"{name} not set: {error}")
    if settings["die_with_parent"] and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return "; ".join(notes)


def _renew_cpu_limit(seconds: float) -> None:
    """Allow `seconds` of CPU time from now on. Ends loops that hold the interpreter lock after the parent is gone."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    wanted = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _exit_with_parent(lifeline_fd: int) -> None:
    # The parent never writes: the read returns when its end is closed, which the kernel does for a killed parent too.
    os.read(lifeline_fd, 1)
    os._exit(1)
