"""paged_attention: one query a sequence over a cache in pages. Bound by the bytes of keys and values."""

import torch
from operation import Inputs, Operation, Shape, Work, at_most, compiled, every_implementation, qwen3_30b_a3b
from qwen3_kernels import paged_attention, reference
from torch import Tensor

TINY = {"B": 3, "context": 21, "page": 4, "H": 4, "G": 2, "C": 16}


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Contexts between half and all of ``context``; every page somewhere else, as in a cache that has been in use."""
    batch, context, page, groups, width = (shape[name] for name in ("B", "context", "page", "G", "C"))
    pages = -(-context // page)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype, generator=generator)

    lens_B = torch.randint(context // 2, context + 1, (batch,), device=device, generator=generator)
    lens_B[0] = context
    return {
        "q": random(batch, shape["H"], width),
        "k_cache": random(batch * pages, page, groups, width),
        "v_cache": random(batch * pages, page, groups, width),
        "block_table": torch.randperm(batch * pages, device=device, generator=generator).view(batch, pages).int(),
        "context_lens": lens_B.int(),
        "inv_freq": 1e6 ** -(torch.arange(0, width, 2, device=device) / width),
        "chunk_size": shape.get("chunk_size"),
        "local_size": shape.get("local_size"),
    }


def call(inputs: Inputs) -> dict[str, Tensor]:
    out_BHC = paged_attention(
        inputs["q"],
        inputs["k_cache"],
        inputs["v_cache"],
        inputs["block_table"],
        inputs["context_lens"],
        inv_freq_R=None if inputs["chunk_size"] is None else inputs["inv_freq"],
        chunk_size=inputs["chunk_size"],
        local_size=inputs["local_size"],
    )
    return {"out": out_BHC}


def truth(inputs: Inputs) -> dict[str, Tensor]:
    names = ("q", "k_cache", "v_cache", "block_table", "context_lens", "inv_freq", "chunk_size", "local_size")
    return {"out": reference.paged_attention(*[*(inputs[name] for name in names), None])}


def work(shape: Shape, direction: str) -> Work:
    """Keys and values of three quarters of ``context``, the average, once each; four FLOPs an element and head."""
    keys = shape["B"] * 0.75 * shape["context"]
    return Work(4 * keys * shape["H"] * shape["C"], 2 * 2 * keys * shape["G"] * shape["C"])


OPERATION = Operation(
    name="paged_attention",
    shapes={
        "tiny": TINY,
        "tiny_chunked": {**TINY, "chunk_size": 8, "local_size": 3},
        "64x4096": qwen3_30b_a3b(B=64, context=4096, page=16),
        "256x512": qwen3_30b_a3b(B=256, context=512, page=16),
        "8x32768": qwen3_30b_a3b(B=8, context=32768, page=16),
        "8x32768_chunked": qwen3_30b_a3b(B=8, context=32768, page=16, chunk_size=8192, local_size=512),
    },
    make_inputs=make_inputs,
    truth=truth,
    contenders={**every_implementation("paged_attention", call), "reference_compiled": compiled(truth)},
    work=work,
    directions=lambda shape: ("forward",),
    check_shape=at_most(B=8),
)
