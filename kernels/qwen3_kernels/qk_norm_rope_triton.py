"""QK-norm and RoPE on q and k in one launch, and their registration with autograd.

Legend: T tokens, H query heads, G kv heads, C head width, R = C / 2 rotated pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_kernels.launch import Launch, generation
from qwen3_kernels.qk_norm_rope_backward_triton import backward
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

FEW_TOKENS = 512
"""Up to here (decode) programs of whole rows do not fill a GPU, and the heads are split over programs too."""
HEAD_SPLITS = 16

_LAUNCH = {
    "few": Launch({"TOKENS": 4, "HEADS": 1}, num_warps=1, num_stages=1),
    "many": Launch({"TOKENS": 4, "HEADS": 8}, num_warps=1, num_stages=1),
    "wide": Launch({"TOKENS": 4, "HEADS": 1}, num_warps=2, num_stages=1),
}
FORWARD = {(gpu, bucket): launch for gpu in (80, 90, 100) for bucket, launch in _LAUNCH.items()}


@triton.jit
def _forward_heads(
    x_ptr,
    out_ptr,
    weight_ptr,
    x_stride_T,
    token,
    mask,
    cos,
    sin,
    eps,
    NUM_HEADS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr,
):
    weight_low, weight_high = weight_halves(weight_ptr, R, BLOCK_R)
    x_ptrs = row_pointers(x_ptr, token, x_stride_T, BLOCK_R)
    out_ptrs = row_pointers(out_ptr, token, NUM_HEADS * 2 * R, BLOCK_R)
    for first_head in range(tl.program_id(1) * HEADS, NUM_HEADS, tl.num_programs(1) * HEADS):
        x = load_heads(x_ptrs, mask, first_head, NUM_HEADS, R, HEADS)
        for i in tl.static_range(HEADS):
            low, high, _ = normed(x[2 * i], x[2 * i + 1], eps, R)
            low, high = low * weight_low, high * weight_high
            exists = head_mask(mask, first_head + i, NUM_HEADS, HEADS)
            ptrs = out_ptrs + (first_head + i) * (2 * R)
            tl.store(ptrs, low * cos - high * sin, mask=exists)
            tl.store(ptrs + R, high * cos + low * sin, mask=exists)


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    position_ids_ptr,
    inv_freq_ptr,
    q_out_ptr,
    k_out_ptr,
    num_tokens,
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
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    in_tokens = token < num_tokens
    mask = in_tokens[:, None] & (tl.arange(0, BLOCK_R) < R)[None, :]
    cos, sin = rotation(position_ids_ptr, inv_freq_ptr, token, in_tokens, factor, R, BLOCK_R)
    _forward_heads(q_ptr, q_out_ptr, q_weight_ptr, q_stride_T, token, mask, cos, sin, eps, H, R, BLOCK_R, HEADS)
    _forward_heads(k_ptr, k_out_ptr, k_weight_ptr, k_stride_T, token, mask, cos, sin, eps, G, R, BLOCK_R, HEADS)


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
    block_R = triton.next_power_of_2(width // 2)
    is_few = num_tokens <= FEW_TOKENS
    launch = FORWARD[generation(q_THC.device), bucket(width, is_few)]
    grid = (triton.cdiv(num_tokens, launch.blocks["TOKENS"]), HEAD_SPLITS if is_few else 1)
    _forward_kernel[grid](
        q_THC,
        k_TGC,
        q_norm_weight_C.contiguous(),
        k_norm_weight_C.contiguous(),
        position_ids_T.contiguous(),
        inv_freq_R.contiguous(),
        q_out_THC,
        k_out_TGC,
        num_tokens,
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
