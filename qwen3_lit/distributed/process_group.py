"""Leaving the process group when the program ends.

Lightning does so where the backend is ``nccl`` and nothing else. A program that ends while threads of a gloo group
still run is aborted now and then ("terminate called without an active exception"), and a phase that was finished
counts as failed.
"""

import atexit

import torch.distributed as dist


def leave_at_exit() -> None:
    """Destroy the default process group, if there is one by then, before the interpreter ends; once is enough."""
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
