"""Kernels that the ahead-of-time gate must reject, one a reason, and one that it must let pass."""

import os
import time

import triton
import triton.language as tl
from qwen3_kernels.launch import AotCase, Launch


@triton.jit
def copy(source_ptr, target_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + offsets, tl.load(source_ptr + offsets, mask=offsets < size), mask=offsets < size)


@triton.jit
def product(a_ptr, b_ptr, out_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    sums = tl.zeros((M, N), tl.float32)
    for step in range(steps):
        a = tl.load(a_ptr + rows[:, None] * 1024 + step * K + inner)
        b = tl.load(b_ptr + (step * K + inner)[:, None] * 1024 + columns)
        sums = tl.dot(a, b, sums)
    tl.store(out_ptr + rows[:, None] * N + columns, sums)


@triton.jit
def unknown_name(source_ptr):
    tl.store(source_ptr, tl.this_function_does_not_exist(source_ptr))


class Aborting:
    """Stands where a kernel should be and ends the process, as a failed assertion of the compiler does."""

    @property
    def arg_names(self) -> list[str]:
        time.sleep(0.1)
        os.abort()


COPY = {"source_ptr": "*bf16", "target_ptr": "*bf16", "size": "i32"}
PRODUCT = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "steps": "i32"}
TOO_FEW_REGISTERS = Launch({"M": 256, "N": 256, "K": 32}, num_warps=4, num_stages=1)
TOO_MUCH_SHARED_MEMORY = Launch({"M": 128, "N": 256, "K": 128}, num_warps=8, num_stages=4)

AOT_CASES = [
    AotCase("passes", copy, COPY, {}, Launch({"BLOCK": 1024}, 4, 1), (90,)),
    AotCase("spills", product, PRODUCT, {}, TOO_FEW_REGISTERS, (90,)),
    AotCase("shared_memory", product, PRODUCT, {}, TOO_MUCH_SHARED_MEMORY, (90,), max_spill_bytes=1 << 20),
    AotCase("does_not_compile", unknown_name, {"source_ptr": "*fp32"}, {}, Launch({}, 4, 1), (90,)),
    AotCase("no_wgmma", copy, COPY, {}, Launch({"BLOCK": 1024}, 4, 1), (90,), wgmma=True),
    AotCase("argument_missing", copy, {"source_ptr": "*bf16"}, {}, Launch({"BLOCK": 1024}, 4, 1), (90,)),
    AotCase("compiler_aborts", Aborting(), {}, {}, Launch({}, 4, 1), (90,)),
]
