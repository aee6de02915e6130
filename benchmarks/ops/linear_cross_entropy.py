"""linear_cross_entropy: the head and the loss, without ever storing [T, V]."""

import torch
import torch.nn.functional as F
from operation import Call, Contender, Inputs, Operation, Shape, Work, compiled, every_implementation, qwen3_30b_a3b
from qwen3_kernels import dispatch, linear_cross_entropy
from torch import Tensor

TINY = {"T": 37, "D": 24, "V": 101}


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Logits of unit variance; every tenth token has no target."""
    tokens, width, vocab = (shape[name] for name in "TDV")
    target_T = torch.randint(vocab, (tokens,), device=device, generator=generator)
    target_T[::10] = -100
    return {
        "hidden": torch.randn(tokens, width, device=device, dtype=dtype, generator=generator),
        "weight": torch.randn(vocab, width, device=device, dtype=dtype, generator=generator) * width**-0.5,
        "target": target_T,
    }


def call(inputs: Inputs) -> dict[str, Tensor]:
    return {"loss": linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["target"]).loss}


def truth(inputs: Inputs) -> dict[str, Tensor]:
    with dispatch.prefer("linear_cross_entropy", "reference"):
        return call(inputs)


def whole_logits(inputs: Inputs) -> dict[str, Tensor]:
    """What a model without a fused loss does."""
    logits_TV = F.linear(inputs["hidden"], inputs["weight"]).float()
    return {"loss": F.cross_entropy(logits_TV, inputs["target"], reduction="sum")}


def liger(**options: object) -> Call:
    """With its defaults, as its users run it, or with larger chunks and float32 accumulation."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run(inputs: Inputs) -> dict[str, Tensor]:
        loss = liger_fused_linear_cross_entropy(
            inputs["hidden"], inputs["weight"], inputs["target"], reduction="sum", **options
        )
        return {"loss": loss[0] if isinstance(loss, tuple) else loss}

    return run


def cut_cross_entropy(filter_eps: str | None = "high") -> Call:
    """By default it drops gradients of improbable tokens, which saves it work and costs exactness."""
    from cut_cross_entropy import linear_cross_entropy as cut

    def run(inputs: Inputs) -> dict[str, Tensor]:
        return {
            "loss": cut(inputs["hidden"], inputs["weight"], inputs["target"], reduction="sum", filter_eps=filter_eps)
        }

    return run


def work(shape: Shape, direction: str) -> Work:
    """One product forward, two backward; the head is read and its gradient written."""
    tokens, width, vocab = (shape[name] for name in "TDV")
    products, head, hidden = 2 * tokens * width * vocab, 2 * width * vocab, 2 * tokens * width
    if direction == "forward":
        return Work(products, head + hidden)
    return Work(3 * products, 2 * (head + hidden))


OPERATION = Operation(
    name="linear_cross_entropy",
    shapes={
        "tiny": TINY,
        "check_blocks": {"T": 300, "D": 64, "V": 40000},
        "T=16384": qwen3_30b_a3b(T=16384),
        "T=4096": qwen3_30b_a3b(T=4096),
    },
    make_inputs=make_inputs,
    truth=truth,
    contenders={
        **every_implementation("linear_cross_entropy", call, on_request=("reference",)),
        "whole_logits": Contender(lambda: whole_logits),
        "whole_logits_compiled": compiled(whole_logits),
        "liger": Contender(liger, package="liger-kernel", tolerance=0.1),  # it adds 64 chunks up in bfloat16
        "liger_8x_chunks": Contender(
            lambda: liger(chunk_mem_const=8, accum_dtype=torch.float32), package="liger-kernel"
        ),
        "cut_cross_entropy": Contender(cut_cross_entropy, package="cut-cross-entropy", tolerance=0.1),
        "cut_cross_entropy_exact": Contender(lambda: cut_cross_entropy(None), package="cut-cross-entropy"),
    },
    work=work,
    differentiable=("hidden", "weight"),
    # The fused ones make their gradients in the forward pass, so there is no backward pass to time by itself.
    directions=lambda shape: ("forward", "both"),
)
