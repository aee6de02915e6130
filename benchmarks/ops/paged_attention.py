"""paged_attention: one query a sequence over a cache in pages. Bound by the bytes of keys and values.

Contexts have the length that a shape's name says; those of a ``ragged`` one lie between half of it and all of it.
"""

import torch
import torch.nn.functional as F
from operation import Call, Contender, Inputs, Operation, Shape, Work, compiled, every_implementation, qwen3_30b_a3b
from qwen3_kernels import paged_attention, reference
from torch import Tensor

TINY = {"B": 3, "context": 21, "page": 4, "H": 4, "G": 2, "C": 16, "ragged": 1}
CHECK = {"B": 3, "context": 601, "page": 16, "H": 8, "G": 2, "ragged": 1}
"""Several splits of a sequence, which ``TINY`` has not."""
CHUNKS = {"chunk_size": 8192, "local_size": 512}


def context_lens(shape: Shape) -> Tensor:
    """The same in every run, because ``work`` counts them."""
    batch, context = shape["B"], shape["context"]
    if not shape.get("ragged"):
        return torch.full((batch,), context, dtype=torch.int32)
    lens_B = torch.randint(context // 2, context + 1, (batch,), generator=torch.Generator().manual_seed(0))
    lens_B[0] = context
    return lens_B.int()


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Every page somewhere else, as in a cache that has been in use."""
    batch, page, groups, width = (shape[name] for name in ("B", "page", "G", "C"))
    pages = -(-shape["context"] // page)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype, generator=generator)

    return {
        "q": random(batch, shape["H"], width),
        "k_cache": random(batch * pages, page, groups, width),
        "v_cache": random(batch * pages, page, groups, width),
        "block_table": torch.randperm(batch * pages, device=device, generator=generator).view(batch, pages).int(),
        "context_lens": context_lens(shape).to(device),
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


def gather_sdpa(inputs: Inputs) -> dict[str, Tensor]:
    """Pages gathered into padded keys and values, then SDPA with a mask.

    The query heads of a kv head stand in SDPA's query dimension, so that nothing is repeated for each of them.
    """
    q_BHC, table_BM = inputs["q"], inputs["block_table"]
    k_BGJC, v_BGJC = (inputs[name][table_BM].flatten(1, 2).transpose(1, 2) for name in ("k_cache", "v_cache"))
    position_J = torch.arange(k_BGJC.shape[2], device=q_BHC.device)
    seen_BJ = position_J < inputs["context_lens"][:, None]
    q_BGQC = q_BHC.unflatten(1, (k_BGJC.shape[1], -1))
    out_BGQC = F.scaled_dot_product_attention(q_BGQC, k_BGJC, v_BGJC, attn_mask=seen_BJ[:, None, None])
    return {"out": out_BGQC.flatten(1, 2)}


def flash_attention_4() -> Call:
    """With its page table. On Hopper it does not split a sequence's keys, and copies pages that are not 128 tokens row
    by row instead of by TMA."""
    from flash_attn.cute import flash_attn_varlen_func

    def run(inputs: Inputs) -> dict[str, Tensor]:
        out = flash_attn_varlen_func(
            inputs["q"][:, None],
            inputs["k_cache"],
            inputs["v_cache"],
            seqused_k=inputs["context_lens"],
            page_table=inputs["block_table"],
        )
        return {"out": (out[0] if isinstance(out, tuple) else out)[:, 0]}

    return run


def only_plain(shape: Shape) -> str | None:
    return "it knows no chunks" if "chunk_size" in shape else None


def work(shape: Shape, direction: str) -> Work:
    """Keys and values of every context once each, its pages' numbers, queries and outputs; four FLOPs an element and
    head."""
    keys, heads, width = int(context_lens(shape).sum()), shape["H"], shape["C"]
    cache = 2 * 2 * keys * shape["G"] * width
    return Work(4 * keys * heads * width, cache + 4 * keys / shape["page"] + 2 * 2 * shape["B"] * heads * width)


OPERATION = Operation(
    name="paged_attention",
    shapes={
        "tiny": TINY,
        "tiny_chunked": {**TINY, "chunk_size": 8, "local_size": 3},
        "check_128": {**CHECK, "C": 128},
        "check_128_chunked": {**CHECK, "C": 128, "chunk_size": 160, "local_size": 32},
        "check_256": {**CHECK, "C": 256},
        "64x4096": qwen3_30b_a3b(B=64, context=4096, page=16),
        "64x4096_ragged": qwen3_30b_a3b(B=64, context=4096, page=16, ragged=1),
        "256x512": qwen3_30b_a3b(B=256, context=512, page=16),
        "8x32768": qwen3_30b_a3b(B=8, context=32768, page=16),
        "8x32768_chunked": qwen3_30b_a3b(B=8, context=32768, page=16, **CHUNKS),
    },
    make_inputs=make_inputs,
    truth=truth,
    contenders={
        **every_implementation("paged_attention", call),
        "reference_compiled": compiled(truth),
        "gather_sdpa": Contender(lambda: gather_sdpa, only_shapes=only_plain),
        "flash_attention_4": Contender(flash_attention_4, package="flash-attn-4", only_shapes=only_plain),
    },
    work=work,
    directions=lambda shape: ("forward",),
)
