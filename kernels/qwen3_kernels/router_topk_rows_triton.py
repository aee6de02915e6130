"""How the routing kernels hold a tile of [T, E]: a token in few threads, sixteen or 32 columns in each.

At E = 128 and 32 columns a token is in four threads, and a reduction over E takes two shuffles that serve eight tokens
of a warp at once; the plain layout of a load, 32 threads a token, takes five for one. ``PARTS`` parts of each row (four
or eight, of four columns a thread) are loaded and joined, which moves no register and leaves columns in the order of
``expert_of_column``.

Legend: T tokens, E experts padded to a power of two.
"""

import triton
import triton.language as tl

# Powers of two are one instruction each; tl.exp adds four that mend results below 1e-38.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def padded_experts(num_experts: int) -> int:
    """The shape bucket of E: 128, 256 or 512."""
    return max(128, triton.next_power_of_2(num_experts))


@triton.jit
def _load_part(
    x_TE, row_T, exists_T, PART: tl.constexpr, PARTS: tl.constexpr, num_experts: tl.constexpr, EXPERTS: tl.constexpr
):
    expert = PART * (EXPERTS // PARTS) + tl.arange(0, EXPERTS // PARTS)
    x_ptr = x_TE + (row_T[:, None] * num_experts + expert[None, :])
    if num_experts < EXPERTS:
        inside = (expert < num_experts)[None, :]
        if exists_T is not None:
            inside = exists_T[:, None] & inside
        return tl.load(x_ptr, mask=inside, other=float("-inf"))
    elif exists_T is not None:
        return tl.load(x_ptr, mask=exists_T[:, None], other=float("-inf"))
    else:
        return tl.load(x_ptr)


@triton.jit
def _load_four(
    x_TE, row_T, exists_T, FIRST: tl.constexpr, PARTS: tl.constexpr, num_experts: tl.constexpr, EXPERTS: tl.constexpr
):
    a = _load_part(x_TE, row_T, exists_T, FIRST, PARTS, num_experts, EXPERTS)
    b = _load_part(x_TE, row_T, exists_T, FIRST + 1, PARTS, num_experts, EXPERTS)
    c = _load_part(x_TE, row_T, exists_T, FIRST + 2, PARTS, num_experts, EXPERTS)
    d = _load_part(x_TE, row_T, exists_T, FIRST + 3, PARTS, num_experts, EXPERTS)
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def load_rows(
    x_TE,
    row_T,
    exists_T,
    TOKENS: tl.constexpr,
    num_experts: tl.constexpr,
    EXPERTS: tl.constexpr,
    PARTS: tl.constexpr = 4,
):
    """[TOKENS, EXPERTS]; -inf where there is no token (``exists_T`` None: all exist) or no expert."""
    parts = _load_four(x_TE, row_T, exists_T, 0, PARTS, num_experts, EXPERTS)
    if PARTS == 8:
        parts = tl.join(parts, _load_four(x_TE, row_T, exists_T, 4, PARTS, num_experts, EXPERTS))
    return tl.reshape(parts, (TOKENS, EXPERTS))


@triton.jit
def _store_quarter(
    x_TE, value, row_T, exists_T, QUARTER: tl.constexpr, num_experts: tl.constexpr, EXPERTS: tl.constexpr
):
    expert = QUARTER * (EXPERTS // 4) + tl.arange(0, EXPERTS // 4)
    inside = exists_T[:, None] & (expert < num_experts)[None, :]
    tl.store(x_TE + row_T[:, None] * num_experts + expert[None, :], value, mask=inside)


@triton.jit
def store_rows(x_TE, value_TE, row_T, exists_T, TOKENS: tl.constexpr, num_experts: tl.constexpr, EXPERTS: tl.constexpr):
    """The inverse of ``load_rows`` with four parts."""
    even, odd = tl.split(tl.reshape(value_TE, (TOKENS, EXPERTS // 4, 2, 2)))
    a, b = tl.split(even)
    c, d = tl.split(odd)
    _store_quarter(x_TE, a, row_T, exists_T, 0, num_experts, EXPERTS)
    _store_quarter(x_TE, b, row_T, exists_T, 1, num_experts, EXPERTS)
    _store_quarter(x_TE, c, row_T, exists_T, 2, num_experts, EXPERTS)
    _store_quarter(x_TE, d, row_T, exists_T, 3, num_experts, EXPERTS)


@triton.jit
def expert_of_column(EXPERTS: tl.constexpr, column_E=None, PARTS: tl.constexpr = 4):
    """Which expert stands in each of ``column_E``, by default all."""
    if column_E is None:
        column_E = tl.arange(0, EXPERTS)
    if PARTS == 8:
        part_E = column_E // 4 % 2 + column_E // 2 % 2 * 2 + column_E % 2 * 4
    else:
        part_E = column_E // 2 % 2 + column_E % 2 * 2
    return column_E // PARTS + part_E * (EXPERTS // PARTS)
