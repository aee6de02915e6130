"""router_topk: softmax over all experts, the K largest, renormalised, with counts and the order by expert.

Bound by bytes, and below some 10,000 tokens by launches. FLOPs are counted roughly: five a logit.
"""

import torch
from operation import Contender, Inputs, Operation, Shape, Work, compiled, every_implementation, qwen3_30b_a3b
from qwen3_kernels import reference, router_topk
from torch import Tensor

TINY = {"T": 33, "E": 8, "K": 2}


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Logits are float32 whatever the model's type is, as the router makes them."""
    logits_TE = torch.randn(shape["T"], shape["E"], device=device, generator=generator)
    return {"logits": logits_TE, "top_k": shape["K"]}


def call(inputs: Inputs) -> dict[str, Tensor]:
    routing = router_topk(inputs["logits"], inputs["top_k"])
    return {
        "weights": routing.weights_TK,
        "prob_sum": routing.prob_sum_E,
        "z_sum": routing.z_sum,
        "expert_ids": routing.expert_ids_TK,
        "counts": routing.counts_E,
        "order": routing.order_N,
    }


def truth(inputs: Inputs) -> dict[str, Tensor]:
    outputs = reference.router_topk(inputs["logits"], inputs["top_k"], True, None, None, None)
    return dict(zip(("expert_ids", "weights", "counts", "prob_sum", "z_sum", "order"), outputs, strict=False))


def composed(inputs: Inputs) -> dict[str, Tensor]:
    """The plain way, which leaves the order of equal scores open; the reference sorts wider keys to settle it."""
    probs_TE = inputs["logits"].softmax(-1)
    chosen_TK, ids_TK = probs_TE.topk(inputs["top_k"], dim=-1)
    ids_N = ids_TK.flatten()
    counts_E = torch.zeros(probs_TE.shape[-1], dtype=torch.long, device=ids_N.device)
    return {
        "weights": chosen_TK / chosen_TK.sum(-1, keepdim=True),
        "prob_sum": probs_TE.sum(0),
        "z_sum": inputs["logits"].logsumexp(-1).square().sum(),
        "expert_ids": ids_TK.int(),
        "counts": counts_E.scatter_add(0, ids_N, torch.ones_like(ids_N)),
        "order": ids_N.to(torch.int16).argsort(stable=True).int(),
    }


def work(shape: Shape, direction: str) -> Work:
    """Forward reads logits and writes id, weight, order and position of every routed row; backward reads logits, ids,
    weights and their gradients and writes the logits' gradient. 4 bytes each. At T = 32,768: 16.8 + 4.2 MB, 36.7 MB."""
    logits, rows = shape["T"] * shape["E"], shape["T"] * shape["K"]
    forward = Work(5 * logits, 4 * logits + 16 * rows)
    backward = Work(5 * logits, 8 * logits + 12 * rows)
    both = Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "both": both}[direction]


OPERATION = Operation(
    name="router_topk",
    shapes={
        "tiny": TINY,
        # Experts are padded to 128, 256 or 512 and slots to 8 or 16; beyond 32,768 tokens a scan takes several rounds.
        "check_256_experts": {"T": 65, "E": 200, "K": 8},
        "check_512_experts": {"T": 65, "E": 512, "K": 16},
        "check_many": {"T": 33000, "E": 128, "K": 8},
        "T=32768": qwen3_30b_a3b(T=32768),
        "T=4096": qwen3_30b_a3b(T=4096),
        "T=256": qwen3_30b_a3b(T=256),
    },
    make_inputs=make_inputs,
    truth=truth,
    contenders={
        **every_implementation("router_topk", call),
        "composed": Contender(lambda: composed),
        "composed_compiled": compiled(composed),
    },
    work=work,
    differentiable=("logits",),
    tolerance=1e-3,
)
