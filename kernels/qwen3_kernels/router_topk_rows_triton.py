"""How the routing kernels hold a tile of [T, E]: sixteen columns in a thread, so a token in eight threads at E = 128.

A reduction over E is then three shuffles that serve four tokens of a warp at once; the plain layout of a load, 32
threads a token, takes five for one. Four quarters of each row are loaded and joined, which moves no register and leaves
columns in the order of ``expert_of_column``.

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
def _load_quarter(x_TE, row_T, exists_T, QUARTER: tl.constexpr, num_experts: tl.constexpr, EXPERTS: tl.constexpr):
    expert = QUARTER * (EXPERTS // 4) + tl.arange(0, EXPERTS // 4)
    inside = exists_T[:, None] & (expert < num_experts)[None, :]
    return tl.load(x_TE + row_T[:, None] * num_experts + expert[None, :], mask=inside, other=float("-inf"))


@triton.jit
def load_rows(x_TE, row_T, exists_T, TOKENS: tl.constexpr, num_experts: tl.constexpr, EXPERTS: tl.constexpr):
    """[TOKENS, EXPERTS]; -inf where there is no token or no expert."""
    a = _load_quarter(x_TE, row_T, exists_T, 0, num_experts, EXPERTS)
    b = _load_quarter(x_TE, row_T, exists_T, 1, num_experts, EXPERTS)
    c = _load_quarter(x_TE, row_T, exists_T, 2, num_experts, EXPERTS)
    d = _load_quarter(x_TE, row_T, exists_T, 3, num_experts, EXPERTS)
    return tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (TOKENS, EXPERTS))


@triton.jit
def _store_quarter(
    x_TE, value, row_T, exists_T, QUARTER: tl.constexpr, num_experts: tl.constexpr, EXPERTS: tl.constexpr
):
    expert = QUARTER * (EXPERTS // 4) + tl.arange(0, EXPERTS // 4)
    inside = exists_T[:, None] & (expert < num_experts)[None, :]
    tl.store(x_TE + row_T[:, None] * num_experts + expert[None, :], value, mask=inside)


@triton.jit
def store_rows(x_TE, value_TE, row_T, exists_T, TOKENS: tl.constexpr, num_experts: tl.constexpr, EXPERTS: tl.constexpr):
    """The inverse of ``load_rows``."""
    even, odd = tl.split(tl.reshape(value_TE, (TOKENS, EXPERTS // 4, 2, 2)))
    a, b = tl.split(even)
    c, d = tl.split(odd)
    _store_quarter(x_TE, a, row_T, exists_T, 0, num_experts, EXPERTS)
    _store_quarter(x_TE, b, row_T, exists_T, 1, num_experts, EXPERTS)
    _store_quarter(x_TE, c, row_T, exists_T, 2, num_experts, EXPERTS)
    _store_quarter(x_TE, d, row_T, exists_T, 3, num_experts, EXPERTS)


@triton.jit
def expert_of_column(EXPERTS: tl.constexpr):
    """[EXPERTS]: which expert stands in each column."""
    column_E = tl.arange(0, EXPERTS)
    return column_E // 4 + (column_E // 2 % 2 + column_E % 2 * 2) * (EXPERTS // 4)
