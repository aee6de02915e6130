"""Fused varlen grouped-query attention on the GPU, plain causal and in dual chunks: launches and autograd.

Legend: T tokens, H query heads, G kv heads, C head width, R = C / 2 rotated pairs; S query heads of one kv head.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qwen3_kernels import dispatch, launch
from qwen3_kernels.dual_chunk_attention_backward_triton import (
    delta_kernel,
    key_gradients_kernel,
    query_gradients_kernel,
)
from qwen3_kernels.dual_chunk_attention_forward_triton import attention_kernel
from qwen3_kernels.dual_chunk_tiles_triton import Tiles, move_queries
from qwen3_kernels.launch import AotCase, Launch

LOG2_E = 1.4426950408889634

FLOAT32 = Launch({"BM": 16, "BN": 16}, num_warps=4, num_stages=1)

FORWARD = {
    (80, 64): Launch({"BM": 128, "BN": 64}, num_warps=8, num_stages=2),
    (80, 128): Launch({"BM": 128, "BN": 32}, num_warps=8, num_stages=2),
    (80, 256): Launch({"BM": 64, "BN": 32}, num_warps=8, num_stages=1),
    (90, 64): Launch({"BM": 128, "BN": 64}, num_warps=8, num_stages=3),
    (90, 128): Launch({"BM": 64, "BN": 64}, num_warps=4, num_stages=2),
    (90, 256): Launch({"BM": 64, "BN": 32}, num_warps=4, num_stages=2),
    (100, 64): Launch({"BM": 128, "BN": 64}, num_warps=4, num_stages=2),
    (100, 128): Launch({"BM": 128, "BN": 64}, num_warps=8, num_stages=2),
    (100, 256): Launch({"BM": 128, "BN": 32}, num_warps=8, num_stages=1),
}
KEY_GRADIENTS = {
    (80, 64): Launch({"BM": 32, "BN": 128}, num_warps=8, num_stages=1),
    (80, 128): Launch({"BM": 32, "BN": 64}, num_warps=8, num_stages=1),
    (80, 256): Launch({"BM": 16, "BN": 64}, num_warps=8, num_stages=1),
    (90, 64): Launch({"BM": 64, "BN": 128}, num_warps=8, num_stages=2),
    (90, 128): Launch({"BM": 64, "BN": 128}, num_warps=8, num_stages=2),
    (90, 256): Launch({"BM": 32, "BN": 64}, num_warps=8, num_stages=1),
    (100, 64): Launch({"BM": 64, "BN": 128}, num_warps=8, num_stages=2),
    (100, 128): Launch({"BM": 64, "BN": 128}, num_warps=8, num_stages=1),
    (100, 256): Launch({"BM": 32, "BN": 64}, num_warps=8, num_stages=1),
}
QUERY_GRADIENTS = {
    (80, 64): Launch({"BM": 128, "BN": 32}, num_warps=8, num_stages=2),
    (80, 128): Launch({"BM": 64, "BN": 32}, num_warps=8, num_stages=2),
    (80, 256): Launch({"BM": 32, "BN": 16}, num_warps=4, num_stages=1),
    (90, 64): Launch({"BM": 128, "BN": 64}, num_warps=8, num_stages=2),
    (90, 128): Launch({"BM": 128, "BN": 64}, num_warps=8, num_stages=3),
    (90, 256): Launch({"BM": 64, "BN": 32}, num_warps=8, num_stages=1),
    (100, 64): Launch({"BM": 128, "BN": 64}, num_warps=8, num_stages=2),
    (100, 128): Launch({"BM": 128, "BN": 64}, num_warps=8, num_stages=1),
    (100, 256): Launch({"BM": 64, "BN": 32}, num_warps=8, num_stages=1),
}
DELTA_ROWS = 32


def unfit(tensor: Tensor, **facts: object) -> str | None:
    """The reason function: head widths that do not fit, then what ``dispatch.needs_float_triton`` says."""
    width = tensor.shape[-1]
    if width % 8 or not 16 <= width <= 256:
        return f"a head width of {width} is not a multiple of 8 from 16 to 256"
    return dispatch.needs_float_triton(tensor)


def run(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    inv_freq_R: Tensor | None,
    chunk_size: int | None,
    local_size: int | None,
    softmax_scale: float | None,
) -> Tensor:
    """See ``dual_chunk_attention``."""
    scale = q_THC.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if scale <= 0:
        raise ValueError(f"dual_chunk_attention: softmax_scale {scale}, expected a positive number; negate q instead")
    chunk_len = None if chunk_size is None or local_size is None else chunk_size - local_size
    cu_seqlens = cu_seqlens.to(torch.int32)
    return attention_forward(q_THC, k_TGC, v_TGC, cu_seqlens, inv_freq_R, chunk_size, chunk_len, scale)[0]


@torch.library.custom_op("qwen3_kernels::dual_chunk_attention", mutates_args=())
def attention_forward(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    cu_seqlens: Tensor,
    inv_freq_R: Tensor | None,
    chunk_size: int | None,
    chunk_len: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention output, and the logsumexp of every query in base 2, [H, T] float32."""
    num_rows, heads, _ = q_THC.shape
    out_THC = torch.empty_like(q_THC, memory_format=torch.contiguous_format)
    lse_HT = torch.empty((heads, num_rows), dtype=torch.float32, device=q_THC.device)
    if num_rows == 0:
        return out_THC, lse_HT
    q_THC, k_TGC, v_TGC = (_described(x) for x in (q_THC, k_TGC, v_TGC))
    chosen = _launch(FORWARD, q_THC)
    tiles = Tiles(cu_seqlens, num_rows, chunk_len, chosen.blocks["BM"], keys=False)
    rotated = _rotated(q_THC, inv_freq_R, chunk_size, tiles)
    attention_kernel[_query_grid(tiles, q_THC, k_TGC)](
        k=_rows(k_TGC, chosen.blocks["BN"]),
        v=_rows(v_TGC, chosen.blocks["BN"]),
        out=out_THC,
        lse=lse_HT,
        slots=tiles.slots,
        **_arguments(q_THC, k_TGC, rotated, tiles, scale, chosen),
    )
    return out_THC, lse_HT


@attention_forward.register_fake
def _(q_THC, k_TGC, v_TGC, cu_seqlens, inv_freq_R, chunk_size, chunk_len, scale):
    out_THC = torch.empty_like(q_THC, memory_format=torch.contiguous_format)
    return out_THC, q_THC.new_empty((q_THC.shape[1], q_THC.shape[0]), dtype=torch.float32)


@torch.library.custom_op("qwen3_kernels::dual_chunk_attention_backward", mutates_args=())
def attention_backward(
    grad_out_THC: Tensor,
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    out_THC: Tensor,
    lse_HT: Tensor,
    cu_seqlens: Tensor,
    inv_freq_R: Tensor | None,
    chunk_size: int | None,
    chunk_len: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    num_rows, heads, width = q_THC.shape
    grad_q_THC, grad_k_TGC, grad_v_TGC = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THC, k_TGC, v_TGC)
    )
    if num_rows == 0:
        return grad_q_THC, grad_k_TGC, grad_v_TGC
    q_THC, k_TGC, v_TGC = (_described(x) for x in (q_THC, k_TGC, v_TGC))
    grad_out_THC = _described(grad_out_THC.contiguous())
    queries, keys = _launch(QUERY_GRADIENTS, q_THC), _launch(KEY_GRADIENTS, q_THC)
    query_tiles = Tiles(cu_seqlens, num_rows, chunk_len, queries.blocks["BM"], keys=False)
    key_tiles = Tiles(cu_seqlens, num_rows, chunk_len, keys.blocks["BN"], keys=True)
    rotated = _rotated(q_THC, inv_freq_R, chunk_size, query_tiles)
    delta_HT = torch.empty_like(lse_HT)
    delta_kernel[(triton.cdiv(num_rows * heads, DELTA_ROWS),)](
        out_THC,
        grad_out_THC,
        delta_HT,
        num_rows * heads,
        num_rows,
        H=heads,
        C=width,
        WIDTH=triton.next_power_of_2(width),
        ROWS=DELTA_ROWS,
        num_warps=4,
    )
    # The keys come first: the second kernel overwrites the rotated copies of q.
    key_gradients_kernel[(key_tiles.most, k_TGC.shape[1])](
        k=k_TGC,
        v=v_TGC,
        k_stride_t=k_TGC.stride(0),
        k_stride_g=k_TGC.stride(1),
        v_stride_t=v_TGC.stride(0),
        v_stride_g=v_TGC.stride(1),
        grad_out=_rows(grad_out_THC, keys.blocks["BM"]),
        lse=lse_HT,
        delta=delta_HT,
        grad_k=grad_k_TGC,
        grad_v=grad_v_TGC,
        scale=scale,
        **_arguments(q_THC, k_TGC, rotated, key_tiles, scale, keys),
    )
    query_gradients_kernel[_query_grid(query_tiles, q_THC, k_TGC)](
        k=_rows(k_TGC, queries.blocks["BN"]),
        v=_rows(v_TGC, queries.blocks["BN"]),
        grad_out=_rows(grad_out_THC, queries.blocks["BM"]),
        lse=lse_HT,
        delta=delta_HT,
        grad_q=grad_q_THC,
        moved=rotated,
        slots=query_tiles.slots,
        scale=scale,
        **_arguments(q_THC, k_TGC, rotated, query_tiles, scale, queries),
    )
    if chunk_size is not None and inv_freq_R is not None:
        move_queries(grad_q_THC, rotated, inv_freq_R, query_tiles, chunk_size, back=True)
    return grad_q_THC, grad_k_TGC, grad_v_TGC


@attention_backward.register_fake
def _(grad_out_THC, q_THC, k_TGC, v_TGC, *rest):
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THC, k_TGC, v_TGC))
    return q, k, v


def _setup_context(ctx, inputs, output):
    q_THC, k_TGC, v_TGC, cu_seqlens, inv_freq_R, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a zero gradient of lse is written for every layer
    ctx.save_for_backward(q_THC, k_TGC, v_TGC, *output, cu_seqlens, inv_freq_R)


def _backward(ctx, grad_out_THC, _):
    if grad_out_THC is None:
        return (None,) * 8
    grads = attention_backward(grad_out_THC, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _launch(table: dict[tuple[int, int], Launch], q_THC: Tensor) -> Launch:
    """The entry for this GPU and head width; float32, which no recipe trains in, has one of its own."""
    if q_THC.dtype == torch.float32:
        return FLOAT32
    return table[launch.generation(q_THC.device), max(64, triton.next_power_of_2(q_THC.shape[-1]))]


def _described(x: Tensor) -> Tensor:
    """``x``, copied where a tensor-memory descriptor can't hold it: rows and start must be multiples of 16 bytes."""
    unit = 16 // x.element_size()
    fits = x.stride(-1) == 1 and x.stride(0) % unit == 0 and x.stride(1) % unit == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _rows(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, 1, triton.next_power_of_2(x.shape[-1])])


def _rotated(q_THC: Tensor, inv_freq_R: Tensor | None, chunk_size: int | None, tiles: Tiles) -> Tensor:
    """q at its three positions [3T, H, C]; q itself where attention is plain."""
    if chunk_size is None or inv_freq_R is None:
        return q_THC
    num_rows, heads, width = q_THC.shape
    moved_3THC = q_THC.new_empty((3 * num_rows, heads, width))
    move_queries(q_THC, moved_3THC, inv_freq_R, tiles, chunk_size, back=False)
    return moved_3THC


def _query_grid(tiles: Tiles, q_THC: Tensor, k_TGC: Tensor) -> tuple[int, int]:
    return tiles.slots * (q_THC.shape[1] // k_TGC.shape[1]), k_TGC.shape[1]


def _arguments(
    q_THC: Tensor, k_TGC: Tensor, rotated: Tensor, tiles: Tiles, scale: float, chosen: Launch
) -> dict[str, Any]:
    """What all three kernels take, and the launch options."""
    return {
        "q": _rows(rotated, chosen.blocks["BM"]),
        "table": tiles.table_N3,
        "most": tiles.most,
        "num_rows": q_THC.shape[0],
        "chunk_len": tiles.chunk_len,
        "scale_log2": scale * LOG2_E,
        "S": q_THC.shape[1] // k_TGC.shape[1],
        "C": q_THC.shape[2],
        "WIDTH": triton.next_power_of_2(q_THC.shape[2]),
        "CHUNKED": tiles.chunked,
        "PRECISION": "ieee" if q_THC.dtype == torch.float32 else "tf32",
        **chosen.options(),
    }


def _aot_case(name: str, kernel: Any, chosen: Launch, generation: int, width: int, chunked: bool) -> AotCase:
    kinds = {
        **{x: f"tensordesc<bf16[{chosen.blocks['BM']},1,{width}]>" for x in ("q", "grad_out")},
        **{x: f"tensordesc<bf16[{chosen.blocks['BN']},1,{width}]>" for x in ("k", "v")},
        **dict.fromkeys(("lse", "delta"), "*fp32"),
        "table": "*i32",
        **dict.fromkeys(("most", "slots", "num_rows", "chunk_len"), "i32"),
        **dict.fromkeys(("scale", "scale_log2"), "fp32"),
        **dict.fromkeys(("k_stride_t", "k_stride_g", "v_stride_t", "v_stride_g"), "i32:16"),
    }
    if kernel is key_gradients_kernel:
        kinds |= {"k": "*bf16", "v": "*bf16"}
    constexprs = {"S": 8, "C": width, "WIDTH": width, "CHUNKED": chunked, "PRECISION": "tf32"}
    known = {*constexprs, *chosen.blocks}
    return AotCase(
        f"attention {name} C={width} {'chunked' if chunked else 'plain'} ({generation})",
        kernel,
        {argument: kinds.get(argument, "*bf16") for argument in kernel.arg_names if argument not in known},
        constexprs,
        chosen,
        generations=(generation,),
        max_spill_bytes=SPILLS.get((name, width), 0),
        wgmma=generation == 90,
    )


SPILLS = {
    ("forward", 128): 32,
    ("forward", 256): 944,
    ("key gradients", 128): 124,
    ("key gradients", 256): 664,
    ("query gradients", 128): 16,
    ("query gradients", 256): 2496,
}
"""Bytes for Hopper, stores and loads together, the worst of Triton 3.6 and 3.8, chunked and plain."""

AOT_CASES = [
    _aot_case(name, kernel, chosen, generation, width, chunked)
    for name, kernel, table in (
        ("forward", attention_kernel, FORWARD),
        ("key gradients", key_gradients_kernel, KEY_GRADIENTS),
        ("query gradients", query_gradients_kernel, QUERY_GRADIENTS),
    )
    for (generation, width), chosen in table.items()
    for chunked in (False, True)
] + [
    AotCase(
        "attention delta",
        delta_kernel,
        {"out": "*bf16", "grad_out": "*bf16", "delta": "*fp32", "num_rows": "i32", "num_tokens": "i32"},
        {"H": 32, "C": 128, "WIDTH": 128, "ROWS": DELTA_ROWS},
        Launch({}, 4, 1),
    )
]
