"""Plain causal attention by the flash-attn package (Dao-AILab/flash-attention), where it is installed.

Legend: T tokens, H query heads, G kv heads, C head width.

Version 4 (distribution flash-attn-4, ``flash_attn.cute``) brings kernels that torch.compile can't see through and is
wrapped here as operators; versions 3 and 2 register operators of their own.
"""

import importlib
import importlib.metadata
from typing import Any

import torch
from torch import Tensor


def _installed() -> int | None:
    for version, distributions in ((4, ("flash-attn-4",)), (3, ("flash-attn-3", "flash_attn_3")), (2, ("flash-attn",))):
        for distribution in distributions:
            try:
                importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
            return version
    return None


VERSION = _installed()
"""Major version of the newest flash-attn installed, or None."""

OLDEST = {4: (9, 0), 3: (9, 0), 2: (8, 0)}
"""Compute capability that a version needs: 4 has a backward pass from Hopper on."""


def unfit(tensor: Tensor, *, chunked: bool = False, **facts: object) -> str | None:
    """Why flash-attn can't take this tensor, or None."""
    width = tensor.shape[-1]
    if VERSION is None:
        return "none of the flash-attn packages is installed"
    if not tensor.is_cuda:
        return f"the tensor is on {tensor.device.type}"
    if chunked:
        return "flash-attn has no dual chunks and a document may be longer than one chunk"
    if tensor.dtype not in (torch.bfloat16, torch.float16):
        return f"{tensor.dtype} is neither bfloat16 nor float16"
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < OLDEST[VERSION] or (VERSION == 3 and capability >= (10, 0)):
        return f"flash-attn {VERSION} does not fit compute capability {capability[0]}.{capability[1]}"
    # On Hopper 4.0.0b10 puts the sums for q in order, but not those for k and v over the query heads of a kv head.
    if VERSION == 4 and capability[0] not in (10, 11) and torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is on, which flash-attn 4 obeys on compute capability 10 and 11 only"
    # Version 4's backward pass does not compile for a width of 16 (4.0.0b10).
    step, widest = (32, 128 if capability >= (10, 0) else 256) if VERSION == 4 else (8, 256)
    if width % step or width > widest:
        return f"a head width of {width} is not a multiple of {step} up to {widest}"
    return None


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
    """See ``dual_chunk_attention``; the chunk arguments are None."""
    scale = q_THC.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    cu_seqlens = cu_seqlens.to(torch.int32)
    if VERSION == 4:
        return flash4_forward(q_THC, k_TGC, v_TGC, cu_seqlens, max_seqlen, scale)[0]
    module = importlib.import_module("flash_attn_interface" if VERSION == 3 else "flash_attn")
    out = module.flash_attn_varlen_func(
        q_THC,
        k_TGC,
        v_TGC,
        **_causal_documents(cu_seqlens, max_seqlen, scale),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out[0] if isinstance(out, tuple) else out


def _causal_documents(cu_seqlens: Tensor, max_seqlen: int, scale: float) -> dict[str, Any]:
    """What every version takes, by its names, for causal attention within packed documents."""
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": max_seqlen,
        "softmax_scale": scale,
        "causal": True,
    }


@torch.library.custom_op("qwen3_kernels::flash4_attention", mutates_args=())
def flash4_forward(
    q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention output, and the logsumexp of every query [H, T] float32."""
    if q_THC.shape[0] == 0:
        return torch.empty_like(q_THC), q_THC.new_empty((q_THC.shape[1], 0), dtype=torch.float32)
    out_THC, lse_HT = importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd(
        q_THC, k_TGC, v_TGC, **_causal_documents(cu_seqlens, max_seqlen, scale), return_lse=True
    )
    return out_THC, lse_HT


@flash4_forward.register_fake
def _(q_THC, k_TGC, v_TGC, cu_seqlens, max_seqlen, scale):
    out_THC = torch.empty_like(q_THC, memory_format=torch.contiguous_format)
    return out_THC, q_THC.new_empty((q_THC.shape[1], q_THC.shape[0]), dtype=torch.float32)


@torch.library.custom_op("qwen3_kernels::flash4_attention_backward", mutates_args=())
def flash4_backward(
    grad_out_THC: Tensor,
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    out_THC: Tensor,
    lse_HT: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THC, k_TGC, v_TGC))
    if q_THC.shape[0]:
        importlib.import_module("flash_attn.cute.interface")._flash_attn_bwd(
            q_THC,
            k_TGC,
            v_TGC,
            out_THC,
            grad_out_THC.contiguous(),
            lse_HT,
            **_causal_documents(cu_seqlens, max_seqlen, scale),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=grads[0],
            dk=grads[1],
            dv=grads[2],
        )
    return grads[0], grads[1], grads[2]


@flash4_backward.register_fake
def _(grad_out_THC, q_THC, k_TGC, v_TGC, *rest):
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THC, k_TGC, v_TGC))
    return q, k, v


def _setup_context(ctx, inputs, output):
    q_THC, k_TGC, v_TGC, cu_seqlens, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a zero gradient of lse is written for every layer
    ctx.save_for_backward(q_THC, k_TGC, v_TGC, *output, cu_seqlens)


def _backward(ctx, grad_out_THC, _):
    if grad_out_THC is None:
        return (None,) * 6
    return *flash4_backward(grad_out_THC, *ctx.saved_tensors, *ctx.options), None, None, None


flash4_forward.register_autograd(_backward, setup_context=_setup_context)
