"""What the two directions of QK-norm and RoPE share: tiles of a token, the rotation, launches fitted to a model.

Legend: T tokens, H query heads, G kv heads, C head width, R = C / 2 rotated pairs.

A program reads one token at a time, in the order of memory, and asks for its tiles before it uses the first: the
requests in flight, not the arithmetic, set the pace. A tile is [heads, pairs] of the token, held twice, the low and the
high half of the heads, so that a rotation never crosses lanes. Position, sine and cosine are those of the one token:
every lane computes a few pairs and gets the rest from the others, without a table in memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from qwen3_kernels.launch import AotCase, Launch
from qwen3_kernels.rotation_triton import cos_sin


@triton.jit
def rotation(position_ids_ptr, inv_freq_ptr, token, factor, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """cos and sin [1, pairs], scaled; float32 throughout, as the reference has it."""
    pair = tl.arange(0, BLOCK_R)
    inv_freq = tl.load(inv_freq_ptr + pair, mask=pair < R, other=0.0).to(tl.float32)
    cos, sin = cos_sin(tl.load(position_ids_ptr + token).to(tl.float32) * inv_freq)
    return (cos * factor)[None, :], (sin * factor)[None, :]


@triton.jit
def weight_halves(weight_ptr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    pair = tl.arange(0, BLOCK_R)
    low = tl.load(weight_ptr + pair, mask=pair < R, other=0.0).to(tl.float32)
    high = tl.load(weight_ptr + R + pair, mask=pair < R, other=0.0).to(tl.float32)
    return low[None, :], high[None, :]


@triton.jit
def _tile(first_head, NUM_HEADS: tl.constexpr, R: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Offsets within a token, and which of them exist."""
    head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    pair = tl.arange(0, BLOCK_R)[None, :]
    return head * (2 * R) + pair, (head < NUM_HEADS) & (pair < R)


@triton.jit
def load_halves(
    row_ptr, first_head, NUM_HEADS: tl.constexpr, R: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_R: tl.constexpr
):
    offset, mask = _tile(first_head, NUM_HEADS, R, BLOCK_HEADS, BLOCK_R)
    low = tl.load(row_ptr + offset, mask=mask, other=0.0)
    return low, tl.load(row_ptr + R + offset, mask=mask, other=0.0)


@triton.jit
def store_halves(
    row_ptr,
    low,
    high,
    first_head,
    NUM_HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offset, mask = _tile(first_head, NUM_HEADS, R, BLOCK_HEADS, BLOCK_R)
    tl.store(row_ptr + offset, low, mask=mask)
    tl.store(row_ptr + R + offset, high, mask=mask)


@triton.jit
def inverse_rms(low, high, eps, R: tl.constexpr):
    return tl.rsqrt(tl.sum(low * low + high * high, axis=1) / (2 * R) + eps)[:, None]


def token_rows(x_THC: Tensor) -> Tensor:
    """``x`` itself where each token's heads are packed (a slice of a fused projection is), else a copy."""
    packed = x_THC.stride(2) == 1 and (x_THC.shape[1] == 1 or x_THC.stride(1) == x_THC.shape[2])
    return x_THC if packed else x_THC.contiguous()


def fitted(launch: Launch, heads: int, groups: int, width: int) -> Launch:
    """``launch``, whose ``BLOCK_H`` is for heads of 128, with the sizes of a model: wider heads, fewer in a tile."""
    pairs = triton.next_power_of_2(width // 2)
    largest = max(1, launch.blocks["BLOCK_H"] * 64 // pairs)
    sizes = {
        "H": heads,
        "G": groups,
        "R": width // 2,
        "BLOCK_H": min(largest, triton.next_power_of_2(heads)),
        "BLOCK_G": min(largest, triton.next_power_of_2(groups)),
        "BLOCK_R": pairs,
    }
    return launch._replace(blocks={**launch.blocks, **sizes})


AOT_MODELS = {"": (32, 4, 128), " 14B": (40, 8, 128), " 235B": (64, 4, 128), " wide": (16, 8, 256), " odd": (5, 1, 80)}
"""Query heads, kv heads and their width: Qwen3-30B-A3B, other Qwen3, and what no Qwen3 has."""


def aot_cases(direction: str, table: dict[int, Launch], kernel: object, extra: dict[str, str]) -> list[AotCase]:
    """Every launch of one direction; ``extra`` adds to the arguments that both have."""
    signature = dict.fromkeys(("q_ptr", "k_ptr", "q_weight_ptr", "k_weight_ptr"), "*bf16")
    signature |= {"position_ids_ptr": "*i64", "inv_freq_ptr": "*fp32"}
    signature |= {"q_stride_T": "i32:16", "k_stride_T": "i32:16", "factor": "fp32", "eps": "fp32"}
    return [
        AotCase(
            f"qk_norm_rope {direction}{model} ({gpu})", kernel, signature | extra, {}, fitted(launch, *sizes), (gpu,)
        )
        for gpu, launch in table.items()
        for model, sizes in AOT_MODELS.items()
    ]
