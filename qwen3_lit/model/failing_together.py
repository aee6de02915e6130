"""What rank 0 alone can fail at (a full disk, a missing tokenizer) ends every rank, at once and with the same error.

Without it the other ranks wait in their next collective until the process group times out, half an hour with torch's
default, and the message that says what was wrong is followed by theirs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from qwen3_lit.errors import UserError


@contextmanager
def failing_together() -> Iterator[None]:
    """Rank 0's exception in the block is raised on every rank at the block's end.

    Every rank of the process group has to enter it, in the same order, and none leaves before rank 0 does. Blocks may
    be nested. Collectives inside are the block's own matter: rank 0 has to take part in those that the other ranks
    enter, even after it has failed. An exception of another rank stays its own.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if dist.is_available() and dist.is_initialized():
        of_rank_0 = [_portable(failure)]
        dist.broadcast_object_list(of_rank_0)
        failure = failure or of_rank_0[0]
    if failure is not None:
        raise failure


def _portable(error: Exception | None) -> Exception | None:
    """``error`` in a type that pickles; the command line tells bad input and a full disk by these two."""
    if (
        error is None
        or type(error) is UserError
        or (isinstance(error, OSError) and type(error).__module__ == "builtins")
    ):
        return error
    return RuntimeError(f"rank 0 failed: {type(error).__name__}: {error}")
