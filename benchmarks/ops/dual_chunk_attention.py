"""dual_chunk_attention: causal attention over packed documents, plain and in dual chunks.

FLOPs count the causal triangle, and backward as 2.5 times forward (five products instead of two), as flash-attention
does. Dual chunks need no more of them than plain attention. Contenders with ``sdpa`` or ``aten`` in their names run
what comes with torch; flash-attention 4 is the flash-attn-4 package.

The check covers the timed shape up to 32,768 tokens, 1 x 131,072 in dual chunks as 1 x 32,768, which takes the same
launches: their tables know the GPU and the head width alone.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from flash_compositions import aten_flash, flash_4
from operation import (
    Call,
    Contender,
    Inputs,
    Operation,
    Shape,
    Work,
    at_most,
    every_implementation,
    qwen3_30b_a3b,
)
from qwen3_kernels import dual_chunk_attention, reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

TINY = {"documents": 2, "length": 40, "H": 4, "G": 2, "C": 16}
CHECK = {"documents": 2, "length": 300, "H": 4, "G": 2}
"""Its widths with that of ``TINY`` are all of the launch tables."""
CHUNKS = {"chunk_size": 8192, "local_size": 512}
"""The example of the method's authors: chunks of 7,680 tokens."""


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Documents of one length; q and k as if normed and rotated."""
    documents, length, width = shape["documents"], shape["length"], shape["C"]
    tokens = documents * length

    def random(heads: int) -> Tensor:
        return torch.randn(tokens, heads, width, device=device, dtype=dtype, generator=generator)

    return {
        "q": random(shape["H"]),
        "k": random(shape["G"]),
        "v": random(shape["G"]),
        "cu_seqlens": torch.arange(0, tokens + 1, length, device=device, dtype=torch.int32),
        "max_seqlen": length,
        "inv_freq": 1e6 ** -(torch.arange(0, width, 2, device=device) / width),
        "chunk_size": shape.get("chunk_size"),
        "local_size": shape.get("local_size"),
    }


def call(inputs: Inputs) -> dict[str, Tensor]:
    chunked = inputs["chunk_size"] is not None
    out_THC = dual_chunk_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        inputs["cu_seqlens"],
        inputs["max_seqlen"],
        inv_freq_R=inputs["inv_freq"] if chunked else None,
        chunk_size=inputs["chunk_size"],
        local_size=inputs["local_size"],
    )
    return {"out": out_THC}


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """One query head at a time, and once more for its gradient: scores of one at 32,768 tokens take 4.3 GB."""
    heads_H = inputs["q"].split(1, dim=1)
    queries = len(heads_H) // inputs["k"].shape[1]
    keys_G, values_G = inputs["k"].split(1, dim=1), inputs["v"].split(1, dim=1)
    facts = [inputs[name] for name in ("cu_seqlens", "max_seqlen", "inv_freq", "chunk_size", "local_size")]
    outs = [
        checkpoint(
            reference.dual_chunk_attention,
            *(q, keys_G[head // queries], values_G[head // queries], *facts, None),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for head, q in enumerate(heads_H)
    ]
    return {"out": torch.cat(outs, dim=1)}


def by_document(inputs: Inputs, *names: str) -> list[Tensor]:
    """[T, heads, C] as [documents, length, heads, C]."""
    return [inputs[name].unflatten(0, (-1, inputs["max_seqlen"])) for name in names]


def scaled_dot_product(backend: SDPBackend) -> Call:
    """Torch's own, a batch of documents of one length."""

    def run(inputs: Inputs) -> dict[str, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in by_document(inputs, "q", "k", "v"))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return {"out": out.transpose(1, 2).flatten(0, 1)}

    return run


def flash_attention_4() -> Call:
    """The CuTe package, documents packed as ours are."""
    from flash_attn.cute import flash_attn_varlen_func

    def run(inputs: Inputs) -> dict[str, Tensor]:
        bounds, longest = inputs["cu_seqlens"], inputs["max_seqlen"]
        out_THC = flash_attn_varlen_func(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )
        return {"out": out_THC[0] if isinstance(out_THC, tuple) else out_THC}

    return run


def composed_of(attention: Callable[..., Tensor]) -> Call:
    """A composition of flash-attention calls."""

    def run(inputs: Inputs) -> dict[str, Tensor]:
        chunk_size, chunk_len = inputs["chunk_size"], inputs["chunk_size"] - inputs["local_size"]
        out = attention(*by_document(inputs, "q", "k", "v"), inputs["inv_freq"], chunk_size, chunk_len)
        return {"out": out.flatten(0, 1)}

    return run


def only_plain(shape: Shape) -> str | None:
    return "it knows no chunks" if "chunk_size" in shape else None


def only_chunked(shape: Shape) -> str | None:
    return None if "chunk_size" in shape else "the composition is for dual chunks"


def work(shape: Shape, direction: str) -> Work:
    """Reads q, k, v and writes the output; backward reads those and writes three gradients."""
    documents, length, heads, groups, width = (shape[name] for name in ("documents", "length", "H", "G", "C"))
    products = 4 * documents * heads * width * length * (length + 1) / 2
    rows = 2 * documents * length * width * 2 * (heads + groups)
    times = {"forward": (1.0, 1.0), "backward": (2.5, 2.0), "both": (3.5, 3.0)}
    flops, reads = times[direction]
    return Work(flops * products, reads * rows)


OPERATION = Operation(
    name="dual_chunk_attention",
    shapes={
        "tiny": TINY,
        "tiny_chunked": {**TINY, "chunk_size": 12, "local_size": 4},
        **{f"check_{width}": {**CHECK, "C": width} for width in (128, 256)},
        **{f"check_{width}_chunked": {**CHECK, "C": width, "chunk_size": 96, "local_size": 20} for width in (128, 256)},
        "1x32768": qwen3_30b_a3b(documents=1, length=32768),
        "8x4096": qwen3_30b_a3b(documents=8, length=4096),
        "1x32768_chunked": qwen3_30b_a3b(documents=1, length=32768, **CHUNKS),
        "1x131072_chunked": qwen3_30b_a3b(documents=1, length=131072, **CHUNKS),
    },
    slow_shapes=("1x131072_chunked",),
    make_inputs=make_inputs,
    truth=truth,
    contenders={
        **every_implementation("dual_chunk_attention", call, on_request=("sdpa",)),
        "sdpa_flash": Contender(lambda: scaled_dot_product(SDPBackend.FLASH_ATTENTION), only_shapes=only_plain),
        "sdpa_cudnn": Contender(lambda: scaled_dot_product(SDPBackend.CUDNN_ATTENTION), only_shapes=only_plain),
        "flash_attention_4": Contender(flash_attention_4, package="flash-attn-4", only_shapes=only_plain),
        "composed_aten_flash": Contender(lambda: composed_of(aten_flash), only_shapes=only_chunked),
        "composed_flash_4": Contender(lambda: composed_of(flash_4()), package="flash-attn-4", only_shapes=only_chunked),
    },
    work=work,
    differentiable=("q", "k", "v"),
    check_shape=at_most(length=32768),
)
