"""The backward pass of QK-norm and RoPE: one launch for q and k, a small one for the weights' gradients.

Legend: T tokens, H query heads, G kv heads, C head width, R = C / 2 rotated pairs, P programs.

Programs stay and walk over tokens, because the weights' gradients are summed in registers: 220 us at T = 32,768 of
Qwen3-30B-A3B on an H200 (223 launched alone), 96 % of the roofline, as copying these bytes at 4.28 TB/s takes 212. Two
tiles are in flight beside the one in use; one takes 231 us, and a whole token at once, with the four warps that hold
it, 227.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_kernels.launch import AotCase, Launch, generation
from qwen3_kernels.qk_norm_rope_tiles_triton import (
    aot_cases,
    fitted,
    inverse_rms,
    load_halves,
    rotation,
    store_halves,
    token_rows,
    weight_halves,
)

BACKWARD = dict.fromkeys((80, 90, 100), Launch({"BLOCK_H": 8, "AHEAD": 2}, num_warps=2, num_stages=1))
REDUCE = Launch({"BLOCK_P": 1024, "BLOCK_C": 8}, num_warps=8, num_stages=1)
PROGRAMS = {80: 6 * 108, 90: 6 * 132, 100: 6 * 148}
"""What the largest GPU of a generation holds at once: six of 168 registers a thread to a multiprocessor. Fixed, so that
the order of the weight gradients' sums is too."""


@triton.jit
def _load_pair(
    x_row_ptr,
    grad_out_row_ptr,
    first_head,
    NUM_HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    x = load_halves(x_row_ptr, first_head, NUM_HEADS, R, BLOCK_HEADS, BLOCK_R)
    return x, load_halves(grad_out_row_ptr, first_head, NUM_HEADS, R, BLOCK_HEADS, BLOCK_R)


@triton.jit
def _load_first(
    x_row_ptr,
    grad_out_row_ptr,
    NUM_HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The first ``AHEAD`` tiles of inputs and gradients, requested before any is used."""
    tiles = ()
    for i in tl.static_range(AHEAD):
        if i * BLOCK_HEADS < NUM_HEADS:
            tile = _load_pair(x_row_ptr, grad_out_row_ptr, i * BLOCK_HEADS, NUM_HEADS, R, BLOCK_HEADS, BLOCK_R)
            tiles = tiles + (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def _backward_heads(
    tiles,
    x_row_ptr,
    grad_out_row_ptr,
    grad_x_row_ptr,
    weight_ptr,
    cos,
    sin,
    eps,
    sum_low,
    sum_high,
    NUM_HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Writes the gradient of x and returns the weight's sums [heads of a tile, pairs] with these heads added.

    With y = w x rstd and g the gradient of y times rstd: dw = g x, dx = w g - x rstd^2 mean(w g x).
    """
    weight_low, weight_high = weight_halves(weight_ptr, R, BLOCK_R)
    for first_head in tl.static_range(0, NUM_HEADS, BLOCK_HEADS):
        if first_head + AHEAD * BLOCK_HEADS < NUM_HEADS:
            next_head = first_head + AHEAD * BLOCK_HEADS
            tile = _load_pair(x_row_ptr, grad_out_row_ptr, next_head, NUM_HEADS, R, BLOCK_HEADS, BLOCK_R)
            tiles = tiles + (tile,)
        x, grad_out = tiles[first_head // BLOCK_HEADS]
        low, high = x[0].to(tl.float32), x[1].to(tl.float32)
        out_low, out_high = grad_out[0].to(tl.float32), grad_out[1].to(tl.float32)
        rstd = inverse_rms(low, high, eps, R)
        # The transposed rotation; cos and sin carry the factor.
        grad_low, grad_high = rstd * (out_low * cos + out_high * sin), rstd * (out_high * cos - out_low * sin)
        sum_low += grad_low * low
        sum_high += grad_high * high
        grad_low, grad_high = grad_low * weight_low, grad_high * weight_high
        mean = (tl.sum(grad_low * low + grad_high * high, axis=1) / (2 * R))[:, None] * (rstd * rstd)
        grad_low, grad_high = grad_low - low * mean, grad_high - high * mean
        store_halves(grad_x_row_ptr, grad_low, grad_high, first_head, NUM_HEADS, R, BLOCK_HEADS, BLOCK_R)
    return sum_low, sum_high


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    grad_q_out_ptr,
    grad_k_out_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    position_ids_ptr,
    inv_freq_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_weights_P2C_ptr,
    num_tokens,
    grad_q_out_stride_T,
    grad_k_out_stride_T,
    q_stride_T,
    k_stride_T,
    factor,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    AHEAD: tl.constexpr,
):
    q_low, q_high = tl.zeros([BLOCK_H, BLOCK_R], tl.float32), tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    k_low, k_high = tl.zeros([BLOCK_G, BLOCK_R], tl.float32), tl.zeros([BLOCK_G, BLOCK_R], tl.float32)
    for index in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        q_row_ptr, grad_q_out_row_ptr = q_ptr + token * q_stride_T, grad_q_out_ptr + token * grad_q_out_stride_T
        k_row_ptr, grad_k_out_row_ptr = k_ptr + token * k_stride_T, grad_k_out_ptr + token * grad_k_out_stride_T
        k_tiles = _load_first(k_row_ptr, grad_k_out_row_ptr, G, R, BLOCK_G, BLOCK_R, AHEAD)
        q_tiles = _load_first(q_row_ptr, grad_q_out_row_ptr, H, R, BLOCK_H, BLOCK_R, AHEAD)
        cos, sin = rotation(position_ids_ptr, inv_freq_ptr, token, factor, R, BLOCK_R)
        k_low, k_high = _backward_heads(
            k_tiles, k_row_ptr, grad_k_out_row_ptr, grad_k_ptr + token * (G * 2 * R), k_weight_ptr,
            cos, sin, eps, k_low, k_high, G, R, BLOCK_G, BLOCK_R, AHEAD,
        )  # fmt: skip
        q_low, q_high = _backward_heads(
            q_tiles, q_row_ptr, grad_q_out_row_ptr, grad_q_ptr + token * (H * 2 * R), q_weight_ptr,
            cos, sin, eps, q_low, q_high, H, R, BLOCK_H, BLOCK_R, AHEAD,
        )  # fmt: skip
    pair = tl.arange(0, BLOCK_R)
    row_ptr = grad_weights_P2C_ptr + tl.program_id(0) * (4 * R) + pair
    tl.store(row_ptr, tl.sum(q_low, axis=0), mask=pair < R)
    tl.store(row_ptr + R, tl.sum(q_high, axis=0), mask=pair < R)
    tl.store(row_ptr + 2 * R, tl.sum(k_low, axis=0), mask=pair < R)
    tl.store(row_ptr + 3 * R, tl.sum(k_high, axis=0), mask=pair < R)


@triton.jit(do_not_specialize=["num_programs"])
def _reduce_kernel(
    grad_weights_P2C_ptr,
    grad_q_weight_ptr,
    grad_k_weight_ptr,
    num_programs,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums the programs' rows in a fixed order."""
    which, channel = tl.program_id(1), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, num_programs, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)
        offset = row[:, None] * (2 * C) + which * C + channel[None, :]
        mask = (row < num_programs)[:, None] & (channel < C)[None, :]
        total += tl.load(grad_weights_P2C_ptr + offset, mask=mask, other=0.0)
    if which == 0:
        tl.store(grad_q_weight_ptr + channel, tl.sum(total, axis=0), mask=channel < C)
    else:
        tl.store(grad_k_weight_ptr + channel, tl.sum(total, axis=0), mask=channel < C)


@torch.library.custom_op("qwen3_kernels::qk_norm_rope_backward", mutates_args=())
def backward(
    grad_q_out_THC: Tensor,
    grad_k_out_TGC: Tensor,
    q_THC: Tensor,
    k_TGC: Tensor,
    q_norm_weight_C: Tensor,
    k_norm_weight_C: Tensor,
    position_ids_T: Tensor,
    inv_freq_R: Tensor,
    attention_factor: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (num_tokens, heads, width), groups = q_THC.shape, k_TGC.shape[1]
    q_THC, k_TGC = token_rows(q_THC), token_rows(k_TGC)
    grad_q_out_THC, grad_k_out_TGC = token_rows(grad_q_out_THC), token_rows(grad_k_out_TGC)
    grad_q_THC = torch.empty(q_THC.shape, dtype=q_THC.dtype, device=q_THC.device)
    grad_k_TGC = torch.empty(k_TGC.shape, dtype=k_TGC.dtype, device=k_TGC.device)
    grad_q_weight_C = torch.empty((width,), dtype=q_norm_weight_C.dtype, device=q_THC.device)
    grad_k_weight_C = torch.empty((width,), dtype=k_norm_weight_C.dtype, device=q_THC.device)
    gpu = generation(q_THC.device)
    launch = fitted(BACKWARD[gpu], heads, groups, width)
    programs = min(num_tokens, PROGRAMS[gpu])
    grad_weights_P2C = torch.empty((programs, 2, width), dtype=torch.float32, device=q_THC.device)
    if num_tokens:
        _backward_kernel[(programs,)](
            grad_q_out_THC,
            grad_k_out_TGC,
            q_THC,
            k_TGC,
            q_norm_weight_C.contiguous(),
            k_norm_weight_C.contiguous(),
            position_ids_T.contiguous(),
            inv_freq_R.contiguous(),
            grad_q_THC,
            grad_k_TGC,
            grad_weights_P2C,
            num_tokens,
            grad_q_out_THC.stride(0),
            grad_k_out_TGC.stride(0),
            q_THC.stride(0),
            k_TGC.stride(0),
            attention_factor,
            eps,
            **launch.options(),
        )
    _reduce_kernel[(triton.cdiv(width, REDUCE.blocks["BLOCK_C"]), 2)](
        grad_weights_P2C, grad_q_weight_C, grad_k_weight_C, programs, C=width, **REDUCE.options()
    )
    return grad_q_THC, grad_k_TGC, grad_q_weight_C, grad_k_weight_C


@backward.register_fake
def _(grad_q_out_THC, grad_k_out_TGC, q_THC, k_TGC, q_norm_weight_C, k_norm_weight_C, *unused):
    return (
        q_THC.new_empty(q_THC.shape),
        k_TGC.new_empty(k_TGC.shape),
        q_norm_weight_C.new_empty(q_norm_weight_C.shape),
        k_norm_weight_C.new_empty(k_norm_weight_C.shape),
    )


_PARTIAL = {"grad_weights_P2C_ptr": "*fp32"}
_GRADIENTS = dict.fromkeys(("grad_q_out_ptr", "grad_k_out_ptr", "grad_q_ptr", "grad_k_ptr"), "*bf16")
_STRIDES = dict.fromkeys(("grad_q_out_stride_T", "grad_k_out_stride_T"), "i32:16")
_REDUCED = _PARTIAL | dict.fromkeys(("grad_q_weight_ptr", "grad_k_weight_ptr"), "*bf16") | {"num_programs": "i32"}
AOT_CASES = [
    *aot_cases("backward", BACKWARD, _backward_kernel, _PARTIAL | _GRADIENTS | _STRIDES | {"num_tokens": "i32"}),
    AotCase("qk_norm_rope weight gradients", _reduce_kernel, _REDUCED, {"C": 128}, REDUCE),
]
