"""Launch parameters of the Triton kernels, and what a compiler without a GPU needs to check them.

Parameters come from small tables, one entry a GPU generation and shape bucket, tuned offline: nothing is tuned at run
time, because a first call that tries variants stalls a training step for minutes and picks by whatever batch comes
first. A bucket never contains a raw number of tokens.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """How one kernel is compiled and started."""

    blocks: Mapping[str, int]
    """Tile sizes and other compile-time integers by their names in the kernel."""
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """Registers a thread may take, where that decides how many blocks share a multiprocessor."""

    def compiler_options(self) -> dict[str, int]:
        """What the compiler is told."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch: ``kernel[grid](..., **launch.options())``."""
        return {**self.blocks, **self.compiler_options()}


class AotCase(NamedTuple):
    """One kernel with one shipped launch, to be compiled for a GPU that need not be there (``qwen3_kernels.aot``)."""

    name: str
    """Unique: operation, direction, shape bucket."""
    kernel: Any
    """The function under ``triton.jit``."""
    signature: Mapping[str, str]
    """Run-time arguments by name: "*bf16", "*fp32", "*i32", "i32", "fp32"; 16-byte alignment is assumed for pointers,
    and for integers written "i32:16"."""
    constexprs: Mapping[str, Any]
    """Compile-time arguments by name, tile sizes of ``launch`` excepted."""
    launch: Launch
    generations: tuple[int, ...] = (80, 90, 100)
    """Compute capabilities, times ten, that this launch ships for."""
    max_spill_bytes: int = 0
    """Recorded spills, stores and loads together, on the tuned generation (90)."""
    wgmma: bool = False
    """The code for Hopper must hold its matrix instructions."""


@functools.cache
def generation(device: torch.device | None = None) -> int:
    """80 for Ampere and Ada, 90 for Hopper, 100 for data-centre Blackwell; 90 where there is no GPU (interpreter).

    The Blackwell of workstations (capability 12.x) has 99 KB of shared memory a block, where the tables for 100 take up
    to 227: it gets those for 80, and so does whatever is not known yet.
    """
    if not torch.cuda.is_available():
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100, 11: 100}.get(major, 80)
