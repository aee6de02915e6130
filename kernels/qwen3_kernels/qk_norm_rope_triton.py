"""QK-norm and RoPE on q and k in one launch, and their registration with autograd.

Legend: T tokens, H query heads, G kv heads, C head width, R = C / 2 rotated pairs.

One program a token: 147 us at T = 32,768 of Qwen3-30B-A3B on an H200 (149 launched alone), 95 % of the roofline, as
copying these bytes at 4.28 TB/s takes 141. Two warps hold the whole token; one takes 150 us, four 162, and programs
that stay and walk over tokens 164 or more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_kernels.launch import Launch, generation
from qwen3_kernels.qk_norm_rope_backward_triton import backward
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

FORWARD = dict.fromkeys((80, 90, 100), Launch({"BLOCK_H": 32}, num_warps=2, num_stages=1))
"""By GPU generation, for any number of tokens: two warps are also the fastest at T = 1 (2.1 us), 64, 512 and 2,048."""


@triton.jit
def _load_heads(row_ptr, NUM_HEADS: tl.constexpr, R: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_R: tl.constexpr):
    """The halves of all heads, all requested before any is used."""
    tiles = ()
    for first_head in tl.static_range(0, NUM_HEADS, BLOCK_HEADS):
        tile = load_halves(row_ptr, first_head, NUM_HEADS, R, BLOCK_HEADS, BLOCK_R)
        tiles = tiles + (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def _forward_heads(
    tiles,
    out_row_ptr,
    weight_ptr,
    cos,
    sin,
    eps,
    NUM_HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    weight_low, weight_high = weight_halves(weight_ptr, R, BLOCK_R)
    low_cos, high_sin, high_cos, low_sin = weight_low * cos, weight_high * sin, weight_high * cos, weight_low * sin
    for i in tl.static_range(len(tiles)):
        low, high = tiles[i][0].to(tl.float32), tiles[i][1].to(tl.float32)
        rstd = inverse_rms(low, high, eps, R)
        out_low, out_high = rstd * (low * low_cos - high * high_sin), rstd * (high * high_cos + low * low_sin)
        store_halves(out_row_ptr, out_low, out_high, i * BLOCK_HEADS, NUM_HEADS, R, BLOCK_HEADS, BLOCK_R)


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    position_ids_ptr,
    inv_freq_ptr,
    q_out_ptr,
    k_out_ptr,
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
):
    # One turn. Outside of a loop the assembler moves a quarter of the loads behind the first sums of squares.
    for index in range(tl.program_id(0), tl.program_id(0) + 1, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        q = _load_heads(q_ptr + token * q_stride_T, H, R, BLOCK_H, BLOCK_R)
        k = _load_heads(k_ptr + token * k_stride_T, G, R, BLOCK_G, BLOCK_R)
        cos, sin = rotation(position_ids_ptr, inv_freq_ptr, token, factor, R, BLOCK_R)
        _forward_heads(q, q_out_ptr + token * (H * 2 * R), q_weight_ptr, cos, sin, eps, H, R, BLOCK_H, BLOCK_R)
        _forward_heads(k, k_out_ptr + token * (G * 2 * R), k_weight_ptr, cos, sin, eps, G, R, BLOCK_G, BLOCK_R)


@torch.library.custom_op("qwen3_kernels::qk_norm_rope", mutates_args=())
def _forward(
    q_THC: Tensor,
    k_TGC: Tensor,
    q_norm_weight_C: Tensor,
    k_norm_weight_C: Tensor,
    position_ids_T: Tensor,
    inv_freq_R: Tensor,
    attention_factor: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    (num_tokens, heads, width), groups = q_THC.shape, k_TGC.shape[1]
    q_THC, k_TGC = token_rows(q_THC), token_rows(k_TGC)
    q_out_THC = torch.empty(q_THC.shape, dtype=q_THC.dtype, device=q_THC.device)
    k_out_TGC = torch.empty(k_TGC.shape, dtype=k_TGC.dtype, device=k_TGC.device)
    if num_tokens == 0:
        return q_out_THC, k_out_TGC
    launch = fitted(FORWARD[generation(q_THC.device)], heads, groups, width)
    _forward_kernel[(num_tokens,)](
        q_THC,
        k_TGC,
        q_norm_weight_C.contiguous(),
        k_norm_weight_C.contiguous(),
        position_ids_T.contiguous(),
        inv_freq_R.contiguous(),
        q_out_THC,
        k_out_TGC,
        q_THC.stride(0),
        k_TGC.stride(0),
        attention_factor,
        eps,
        **launch.options(),
    )
    return q_out_THC, k_out_TGC


@_forward.register_fake
def _(q_THC, k_TGC, q_norm_weight_C, k_norm_weight_C, position_ids_T, inv_freq_R, attention_factor, eps):
    return q_THC.new_empty(q_THC.shape), k_TGC.new_empty(k_TGC.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.attention_factor, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad_q_out_THC, grad_k_out_TGC):
    grads = backward(grad_q_out_THC, grad_k_out_TGC, *ctx.saved_tensors, ctx.attention_factor, ctx.eps)
    return *grads, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def run(
    q_THC: Tensor,
    k_TGC: Tensor,
    q_norm_weight_C: Tensor,
    k_norm_weight_C: Tensor,
    position_ids_T: Tensor,
    inv_freq_R: Tensor,
    attention_factor: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``qk_norm_rope`` on Triton; the arguments of the reference."""
    return _forward(q_THC, k_TGC, q_norm_weight_C, k_norm_weight_C, position_ids_T, inv_freq_R, attention_factor, eps)


AOT_CASES = aot_cases("forward", FORWARD, _forward_kernel, {"q_out_ptr": "*bf16", "k_out_ptr": "*bf16"})
