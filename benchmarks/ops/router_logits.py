"""router_logits: the router's product, whose result must be good to float32. Bound by bytes.

The truth is float64. Products of bfloat16 numbers are exact in float32, so what tells contenders apart in the forward
pass is where they round: one that rounds the logits to bfloat16 is off by 2e-3, the others by 1e-6 and less. Gradients
leave every contender in bfloat16, which alone is 2e-3.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from operation import Contender, Inputs, Operation, Shape, Work, qwen3_30b_a3b
from qwen3_kernels.router_logits import router_logits
from torch import Tensor

TINY = {"T": 33, "D": 32, "E": 8}


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Logits of unit variance."""
    tokens, width, experts = (shape[name] for name in "TDE")
    return {
        "x": torch.randn(tokens, width, device=device, dtype=dtype, generator=generator),
        "weight": torch.randn(experts, width, device=device, dtype=dtype, generator=generator) * width**-0.5,
    }


def call(inputs: Inputs) -> dict[str, Tensor]:
    return {"logits": router_logits(inputs["x"], inputs["weight"])}


def truth(inputs: Inputs) -> dict[str, Tensor]:
    return {"logits": F.linear(inputs["x"].double(), inputs["weight"].double())}


def float32(inputs: Inputs) -> dict[str, Tensor]:
    """Without tensor cores, on float32 copies, as transformers does in a model with float32 routers."""
    return {"logits": F.linear(inputs["x"].float(), inputs["weight"].float())}


def tf32(inputs: Inputs) -> dict[str, Tensor]:
    """The same copies by tensor cores: TF32 holds bfloat16 inputs exactly, and 11 bits of the logits' gradient."""
    return {"logits": TF32Linear.apply(inputs["x"], inputs["weight"])}


def bfloat16_rounded(inputs: Inputs) -> dict[str, Tensor]:
    """What a model without care does; its logits are rounded to 8 bits, so it is not the operation."""
    return {"logits": F.linear(inputs["x"], inputs["weight"]).float()}


class TF32Linear(torch.autograd.Function):
    """Switches TF32 on for its own products, the backward pass's too."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        with allowing_tf32():
            return F.linear(x_TD.float(), weight_ED.float())

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_TD, weight_ED = ctx.saved_tensors
        with allowing_tf32():
            grad_x_TD, grad_weight_ED = grad_TE @ weight_ED.float(), grad_TE.t() @ x_TD.float()
        return grad_x_TD.to(x_TD.dtype), grad_weight_ED.to(weight_ED.dtype)


@contextlib.contextmanager
def allowing_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def work(shape: Shape, direction: str) -> Work:
    """One product forward, two backward; backward reads x, weight and the logits' gradient and writes two gradients."""
    tokens, width, experts = (shape[name] for name in "TDE")
    product, inputs, logits = 2 * tokens * width * experts, 2 * width * (tokens + experts), 4 * tokens * experts
    forward = Work(product, inputs + logits)
    backward = Work(2 * product, 2 * inputs + logits)
    both = Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "both": both}[direction]


OPERATION = Operation(
    name="router_logits",
    shapes={"tiny": TINY, "T=32768": qwen3_30b_a3b(T=32768), "T=4096": qwen3_30b_a3b(T=4096)},
    make_inputs=make_inputs,
    truth=truth,
    contenders={
        "ours": Contender(lambda: call, ours=True),
        "linear_float32": Contender(lambda: float32),
        "linear_tf32": Contender(lambda: tf32),
        "linear_bfloat16_rounded": Contender(lambda: bfloat16_rounded, tolerance=1e-2),
    },
    work=work,
    differentiable=("x", "weight"),
    tolerance=5e-3,
    tolerances={"logits": 1e-4},
)
