"""The process group is left before the interpreter ends."""

import subprocess
import sys

SCRIPT = """
import atexit, sys
import torch.distributed as dist
from qwen3_lit.distributed.process_group import leave_at_exit

# What is registered first runs last.
atexit.register(lambda: print("still a member" if dist.is_initialized() else "left"))
if sys.argv[1] == "member":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
leave_at_exit()
leave_at_exit()
"""


def test_the_group_is_left_at_exit() -> None:
    for membership in ("member", "alone"):
        ended = subprocess.run([sys.executable, "-c", SCRIPT, membership], capture_output=True, text=True, timeout=120)
        assert (ended.returncode, ended.stdout) == (0, "left\n"), ended.stderr
