"""The backward pass of QK-norm and RoPE: one launch for q and k, a small one for the weights' gradients.

Legend: T tokens, H query heads, G kv heads, C head width, R = C / 2 rotated pairs, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_kernels.launch import AotCase, Launch, generation
from qwen3_kernels.qk_norm_rope_tiles_triton import (
    aot_cases,
    bucket,
    head_mask,
    load_heads,
    normed,
    rotation,
    row_pointers,
    token_rows,
    weight_halves,
)

TOKENS_AT_ONCE = 132 * 48
"""Tokens of all programs' first turns: 1,584 programs of 4, one to each place on an H200, 263 us at T = 32,768 (three
to each place 266, fewer than all places 295). Fixed, so that the order of the weight gradients' sums is too."""

_LAUNCH = {
    "many": Launch({"TOKENS": 4, "HEADS": 2}, num_warps=1, num_stages=1),
    "wide": Launch({"TOKENS": 4, "HEADS": 1}, num_warps=2, num_stages=1),
}
BACKWARD = {(gpu, bucket): launch for gpu in (80, 90, 100) for bucket, launch in _LAUNCH.items()}
REDUCE = Launch({"BLOCK_P": 1024, "BLOCK_C": 8}, num_warps=8, num_stages=1)


@triton.jit
def _backward_heads(
    grad_out_ptr,
    x_ptr,
    grad_x_ptr,
    weight_ptr,
    grad_out_stride_T,
    x_stride_T,
    token,
    mask,
    cos,
    sin,
    eps,
    grad_weight_low,
    grad_weight_high,
    NUM_HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Writes the gradient of x and returns the weight's sums [tokens, pairs] with these heads added.

    With h = x rstd (normed), y = w h and g the gradient of y: dw = g h, dx = rstd (w g - h mean(w g h)).
    """
    weight_low, weight_high = weight_halves(weight_ptr, R, BLOCK_R)
    grad_out_ptrs = row_pointers(grad_out_ptr, token, grad_out_stride_T, BLOCK_R)
    x_ptrs = row_pointers(x_ptr, token, x_stride_T, BLOCK_R)
    grad_x_ptrs = row_pointers(grad_x_ptr, token, NUM_HEADS * 2 * R, BLOCK_R)
    for first_head in range(0, NUM_HEADS, HEADS):
        x = load_heads(x_ptrs, mask, first_head, NUM_HEADS, R, HEADS)
        grad_out = load_heads(grad_out_ptrs, mask, first_head, NUM_HEADS, R, HEADS)
        for i in tl.static_range(HEADS):
            low, high, rstd = normed(x[2 * i], x[2 * i + 1], eps, R)
            out_low, out_high = grad_out[2 * i].to(tl.float32), grad_out[2 * i + 1].to(tl.float32)
            # The transposed rotation; cos and sin carry the factor.
            grad_low, grad_high = out_low * cos + out_high * sin, out_high * cos - out_low * sin
            grad_weight_low += grad_low * low
            grad_weight_high += grad_high * high
            grad_low, grad_high = grad_low * weight_low, grad_high * weight_high
            mean = (tl.sum(grad_low * low + grad_high * high, axis=1) / (2 * R))[:, None]
            exists = head_mask(mask, first_head + i, NUM_HEADS, HEADS)
            ptrs = grad_x_ptrs + (first_head + i) * (2 * R)
            tl.store(ptrs, rstd * (grad_low - low * mean), mask=exists)
            tl.store(ptrs + R, rstd * (grad_high - high * mean), mask=exists)
    return grad_weight_low, grad_weight_high


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
    BLOCK_R: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    pair = tl.arange(0, BLOCK_R)
    q_low = tl.zeros([TOKENS, BLOCK_R], tl.float32)
    q_high, k_low, k_high = q_low, q_low, q_low
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, TOKENS), tl.num_programs(0)):
        token = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        in_tokens = token < num_tokens
        mask = in_tokens[:, None] & (pair < R)[None, :]
        cos, sin = rotation(position_ids_ptr, inv_freq_ptr, token, in_tokens, factor, R, BLOCK_R)
        q_low, q_high = _backward_heads(
            grad_q_out_ptr, q_ptr, grad_q_ptr, q_weight_ptr, grad_q_out_stride_T, q_stride_T,
            token, mask, cos, sin, eps, q_low, q_high, H, R, BLOCK_R, HEADS,
        )  # fmt: skip
        k_low, k_high = _backward_heads(
            grad_k_out_ptr, k_ptr, grad_k_ptr, k_weight_ptr, grad_k_out_stride_T, k_stride_T,
            token, mask, cos, sin, eps, k_low, k_high, G, R, BLOCK_R, HEADS,
        )  # fmt: skip
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
    block_R = triton.next_power_of_2(width // 2)
    launch = BACKWARD[generation(q_THC.device), bucket(width)]
    tokens = launch.blocks["TOKENS"]
    programs = min(triton.cdiv(num_tokens, tokens), TOKENS_AT_ONCE // tokens)
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
            H=heads,
            G=groups,
            R=width // 2,
            BLOCK_R=block_R,
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
    *aot_cases("backward", BACKWARD, _backward_kernel, _PARTIAL | _GRADIENTS | _STRIDES),
    AotCase("qk_norm_rope weight gradients", _reduce_kernel, _REDUCED, {"C": 128}, REDUCE),
]
