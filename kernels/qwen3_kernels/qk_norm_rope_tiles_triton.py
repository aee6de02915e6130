"""What the two directions of QK-norm and RoPE share: tiles of a head, normalisation, the rotation.

Legend: T tokens, H query heads, G kv heads, C head width, R = C / 2 rotated pairs.

A tile is [tokens, pairs] of one head, held twice: the low and the high half of the head, so that a rotation never
crosses lanes. A warp spans four tokens and walks over the heads, so every thread computes the sine and cosine of its
own (token, pair) once for all heads, without a table in memory, and the sum of squares is three shuffles.
"""

import triton
import triton.language as tl
from torch import Tensor

from qwen3_kernels.launch import AotCase, Launch
from qwen3_kernels.rotation_triton import cos_sin


@triton.jit
def rotation(position_ids_ptr, inv_freq_ptr, token, in_tokens, factor, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """cos and sin [tokens, pairs], scaled; float32 throughout, as the reference has it."""
    pair = tl.arange(0, BLOCK_R)
    inv_freq = tl.load(inv_freq_ptr + pair, mask=pair < R, other=0.0).to(tl.float32)
    position = tl.load(position_ids_ptr + token, mask=in_tokens, other=0).to(tl.float32)
    angle = position[:, None] * inv_freq[None, :]
    cos, sin = cos_sin(angle)
    return cos * factor, sin * factor


@triton.jit
def weight_halves(weight_ptr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    pair = tl.arange(0, BLOCK_R)
    low = tl.load(weight_ptr + pair, mask=pair < R, other=0.0).to(tl.float32)
    high = tl.load(weight_ptr + R + pair, mask=pair < R, other=0.0).to(tl.float32)
    return low[None, :], high[None, :]


@triton.jit
def row_pointers(ptr, token, stride_T, BLOCK_R: tl.constexpr):
    return ptr + (token * stride_T)[:, None] + tl.arange(0, BLOCK_R)[None, :]


@triton.jit
def head_mask(mask, head, NUM_HEADS: tl.constexpr, HEADS: tl.constexpr):
    return mask if NUM_HEADS % HEADS == 0 else mask & (head < NUM_HEADS)


@triton.jit
def load_heads(row_ptrs, mask, first_head, NUM_HEADS: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr):
    """The halves of HEADS heads, all requested before any is used: memory is busy while the first arrives."""
    halves = ()
    for i in tl.static_range(HEADS):
        exists = head_mask(mask, first_head + i, NUM_HEADS, HEADS)
        ptrs = row_ptrs + (first_head + i) * (2 * R)
        low, high = tl.load(ptrs, mask=exists, other=0.0), tl.load(ptrs + R, mask=exists, other=0.0)
        halves = halves + (low, high)  # type: ignore[assignment]
    return halves


@triton.jit
def normed(low, high, eps, R: tl.constexpr):
    low, high = low.to(tl.float32), high.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(low * low + high * high, axis=1) / (2 * R) + eps)[:, None]
    return low * rstd, high * rstd, rstd


def token_rows(x_THC: Tensor) -> Tensor:
    """``x`` itself where each token's heads are packed (a slice of a fused projection is), else a copy."""
    packed = x_THC.stride(2) == 1 and (x_THC.shape[1] == 1 or x_THC.stride(1) == x_THC.shape[2])
    return x_THC if packed else x_THC.contiguous()


def bucket(width: int, few_tokens: bool = False) -> str:
    """The row of a launch table."""
    if width > 128:
        return "wide"
    return "few" if few_tokens else "many"


def aot_cases(
    direction: str, table: dict[tuple[int, str], Launch], kernel: object, extra: dict[str, str]
) -> list[AotCase]:
    """Every launch of one direction at the shape of Qwen3-30B-A3B; ``extra`` adds to the arguments that both have."""
    signature = dict.fromkeys(("q_ptr", "k_ptr", "q_weight_ptr", "k_weight_ptr"), "*bf16")
    signature |= {"position_ids_ptr": "*i64", "inv_freq_ptr": "*fp32", "num_tokens": "i32"}
    signature |= {"q_stride_T": "i32:16", "k_stride_T": "i32:16", "factor": "fp32", "eps": "fp32"}
    cases = []
    for (gpu, bucket), launch in table.items():
        heads, groups, pairs = (16, 8, 128) if bucket == "wide" else (32, 4, 64)
        constexprs = {"H": heads, "G": groups, "R": pairs, "BLOCK_R": pairs}
        name = f"qk_norm_rope {direction} {bucket} ({gpu})"
        cases.append(AotCase(name, kernel, signature | extra, constexprs, launch, generations=(gpu,)))
    return cases
