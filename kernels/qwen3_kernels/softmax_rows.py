"""What the kernels over rows of logits share: reading a block, and softmax statistics in one pass over a row.

Legend: S = BLOCK / GROUP slots of a block; GROUP neighbouring logits, 16 bytes, belong to a slot.

Each slot keeps a running maximum and sum of its own. Its group lies in one thread, so a step of the pass has neither a
barrier nor a shuffle, and 1 + 1 / GROUP exponentials a logit. Slots meet at the end of the row (``merged``).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
"""Stands for a logit that is not there: finite, so that differences of two are no NaN, and exp2 of it is 0."""


@triton.jit
def columns_of(start, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """[S, GROUP] column numbers of the block at ``start``."""
    return start + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def load_block(
    row, start, valid, BLOCK: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr, EVICT: tl.constexpr
):  # fmt: skip
    """[S, GROUP] float32 logits of the block at ``start``; LOWEST from ``valid`` on where MASKED."""
    columns = columns_of(start, BLOCK, GROUP)
    if MASKED:
        # Whole groups are masked, so that loads stay 16 bytes wide: a row's pitch has room for them.
        there = start + tl.arange(0, BLOCK // GROUP) * GROUP < valid
        x = tl.load(row + columns, mask=there[:, None], other=0.0, eviction_policy=EVICT).to(tl.float32)
        return tl.where(columns < valid, x, LOWEST)
    return tl.load(row + columns, eviction_policy=EVICT).to(tl.float32)


@triton.jit
def seen(max_S, sum_S, x):
    """Statistics after the block ``x``, the factor by which earlier sums shrank, and exp(x - maximum)."""
    new_S = tl.maximum(max_S, tl.max(x, 1))
    shrink_S = tl.exp2((max_S - new_S) * LOG2E)
    # Not x * LOG2E - new * LOG2E: one fused instruction gives the rounding error of a product, 1e22 instead of 0, in a
    # slot that saw LOWEST alone.
    e = tl.exp2((x - new_S[:, None]) * LOG2E)
    return new_S, sum_S * shrink_S + tl.sum(e, 1), shrink_S, e


@triton.jit
def merged(max_S, sum_S):
    """The row's logsumexp, and what a slot's sums weigh in an expectation over the row."""
    row_max = tl.max(max_S, 0)
    scale_S = tl.exp2((max_S - row_max) * LOG2E)
    row_sum = tl.sum(sum_S * scale_S, 0)
    return row_max + tl.log(row_sum), scale_S / row_sum
