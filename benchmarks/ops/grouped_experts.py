"""grouped_experts: gather, gate-up product, SwiGLU, down product, weighted sum, for training and for decode batches."""

import torch
import torch.nn.functional as F
from operation import (
    DIRECTIONS,
    Call,
    Contender,
    Inputs,
    Operation,
    Shape,
    Work,
    compiled,
    every_implementation,
    qwen3_30b_a3b,
)
from qwen3_kernels import dispatch, grouped_experts, router_topk
from torch import Tensor

TINY = {"T": 40, "D": 32, "E": 8, "K": 2, "F": 16}
CHECK = {"D": 384, "E": 4, "K": 2, "F": 384}
"""Widths that descriptors take (whole blocks of 128) and that no tile of 256 columns divides."""
ROWS_PER_EXPERT = {"decode": 6, "few": 20, "some": 100, "many": 300, "plenty": 550}
"""One number in every launch bucket (``grouped_experts_products_triton.bucket``)."""
DECODE_BATCHES = (1, 8, 32, 64, 256)


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Real routing of random logits: near balance, no two experts alike."""
    tokens, width, experts, expert_width = (shape[name] for name in "TDEF")

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype, generator=generator)

    with dispatch.prefer("router_topk", "reference"):
        logits_TE = torch.randn(tokens, experts, device=device, generator=generator)
        routing = router_topk(logits_TE, shape["K"])
    return {
        "x": random(tokens, width),
        "w_gate_up": random(experts, 2 * expert_width, width) * width**-0.5,
        "w_down": random(experts, width, expert_width) * expert_width**-0.5,
        "weights": routing.weights_TK,
        "routing": routing,
    }


def call(inputs: Inputs) -> dict[str, Tensor]:
    routing = inputs["routing"]._replace(weights_TK=inputs["weights"])
    return {"out": grouped_experts(inputs["x"], inputs["w_gate_up"], inputs["w_down"], routing)}


def truth(inputs: Inputs) -> dict[str, Tensor]:
    with dispatch.prefer("grouped_experts", "reference"):
        return call(inputs)


def composed(inputs: Inputs) -> dict[str, Tensor]:
    """What transformers and torchtitan do: sort, two of torch's grouped products, unsort, sum."""
    x_TD, routing = inputs["x"], inputs["routing"]
    tokens, top_k = inputs["weights"].shape
    order_N, offsets_E = routing.order_N.long(), routing.counts_E.cumsum(0).int()
    gate_NF, up_NF = F.grouped_mm(x_TD[order_N // top_k], inputs["w_gate_up"].transpose(1, 2), offs=offsets_E).chunk(
        2, -1
    )
    y_ND = F.grouped_mm(F.silu(gate_NF) * up_NF, inputs["w_down"].transpose(1, 2), offs=offsets_E)
    y_ND = y_ND * inputs["weights"].to(y_ND.dtype).reshape(-1)[order_N, None]
    unsorted_N = torch.empty_like(order_N)
    unsorted_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return {"out": y_ND[unsorted_N].view(tokens, top_k, -1).sum(1).to(x_TD.dtype)}


def liger() -> Call:
    """Tunes each new shape for minutes unless LIGER_FUSED_MOE_AUTOTUNE=0, which fixes one configuration."""
    from liger_kernel.ops import LigerFusedMoEFunction

    def run(inputs: Inputs) -> dict[str, Tensor]:
        out_TD = LigerFusedMoEFunction.apply(
            inputs["x"],
            inputs["w_gate_up"],
            inputs["w_down"],
            inputs["routing"].expert_ids_TK.int(),
            inputs["weights"].to(inputs["x"].dtype),
        )
        return {"out": out_TD}

    return run


def work(shape: Shape, direction: str) -> Work:
    """Two products a row forward and four backward; each pass reads the weights of the experts that have rows (as many
    as even routing gives rows to on average), and the backward pass writes as many."""
    tokens, width, experts, top_k, expert_width = (shape[name] for name in "TDEKF")
    products = tokens * top_k * 6 * width * expert_width
    in_use = experts * (1 - (1 - top_k / experts) ** tokens)
    weights = 2 * 3 * in_use * width * expert_width
    activations = 2 * 2 * tokens * width
    forward = Work(products, weights + activations)
    backward = Work(2 * products, 2 * weights + 1.5 * activations)
    both = Work(3 * products, 3 * weights + 2.5 * activations)
    return {"forward": forward, "backward": backward, "both": both}[direction]


OPERATION = Operation(
    name="grouped_experts",
    shapes={
        "tiny": TINY,
        **{f"check_{bucket}": {"T": 2 * rows, **CHECK} for bucket, rows in ROWS_PER_EXPERT.items()},
        "T=32768": qwen3_30b_a3b(T=32768),
        "T=4096": qwen3_30b_a3b(T=4096),
        **{f"decode_{batch}": qwen3_30b_a3b(T=batch) for batch in DECODE_BATCHES},
    },
    make_inputs=make_inputs,
    truth=truth,
    contenders={
        **every_implementation("grouped_experts", call, on_request=("reference",)),
        "composed_grouped_mm": Contender(lambda: composed),
        "composed_grouped_mm_compiled": compiled(composed),
        "liger": Contender(liger, package="liger-kernel", on_request=True),
    },
    work=work,
    differentiable=("x", "w_gate_up", "w_down", "weights"),
    directions=lambda shape: ("forward",) if shape["T"] in DECODE_BATCHES else DIRECTIONS,
)
