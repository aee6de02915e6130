"""qk_norm_rope: RMSNorm over each head of q and k, then RoPE. Bound by bytes.

FLOPs are counted roughly: ten an element forward, twice that backward.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from operation import Call, Contender, Inputs, Operation, Shape, Work, compiled, every_implementation, qwen3_30b_a3b
from qwen3_kernels import qk_norm_rope, reference
from torch import Tensor

TINY = {"T": 19, "H": 4, "G": 2, "C": 16}
EPS = 1e-6


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    tokens, heads, groups, width = (shape[name] for name in "THGC")

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype, generator=generator)

    position_T = torch.arange(tokens, device=device) % 4096
    inv_freq_R = 1e6 ** -(torch.arange(0, width, 2, device=device) / width)
    angle_TC = (position_T[:, None] * inv_freq_R).repeat(1, 2)
    return {
        "q": random(tokens, heads, width),
        "k": random(tokens, groups, width),
        "q_norm_weight": 1 + 0.1 * random(width),
        "k_norm_weight": 1 + 0.1 * random(width),
        "position": position_T,
        "inv_freq": inv_freq_R,
        "cos": angle_TC.cos()[None],
        "sin": angle_TC.sin()[None],
    }


def call(inputs: Inputs, rotate: Callable[..., tuple[Tensor, Tensor]] = qk_norm_rope) -> dict[str, Tensor]:
    q_THC, k_TGC = rotate(
        inputs["q"],
        inputs["k"],
        inputs["q_norm_weight"],
        inputs["k_norm_weight"],
        inputs["position"],
        inputs["inv_freq"],
        1.0,
        EPS,
    )
    return {"q_rotated": q_THC, "k_rotated": k_TGC}


def truth(inputs: Inputs) -> dict[str, Tensor]:
    return call(inputs, reference.qk_norm_rope)


def composed(inputs: Inputs) -> dict[str, Tensor]:
    """What a model without this package computes in each layer: cos and sin are ready."""
    outputs = {}
    for name in "qk":
        x = inputs[name]
        normed = F.rms_norm(x, x.shape[-1:], inputs[f"{name}_norm_weight"], EPS).float()
        low, high = normed.chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1)
        cos, sin = (inputs[table][0][:, None] for table in ("cos", "sin"))
        outputs[f"{name}_rotated"] = (normed * cos + turned * sin).to(x.dtype)
    return outputs


def liger() -> Call:
    """Two RMSNorms and one rotation; cos and sin are ready, as a model computes them once for all layers."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(inputs: Inputs) -> dict[str, Tensor]:
        q_THC, k_TGC = (
            LigerRMSNormFunction.apply(inputs[name], inputs[f"{name}_norm_weight"], EPS, 0.0, "llama", False)
            for name in "qk"
        )
        q_1HTC, k_1GTC = LigerRopeFunction.apply(
            q_THC.transpose(0, 1)[None], k_TGC.transpose(0, 1)[None], inputs["cos"], inputs["sin"]
        )
        return {"q_rotated": q_1HTC[0].transpose(0, 1), "k_rotated": k_1GTC[0].transpose(0, 1)}

    return run


def work(shape: Shape, direction: str) -> Work:
    """Forward reads and writes q and k; backward reads them and their gradients and writes gradients."""
    elements = shape["T"] * (shape["H"] + shape["G"]) * shape["C"]
    passes = {"forward": (10, 2), "backward": (20, 3), "both": (30, 5)}
    flops, times = passes[direction]
    return Work(flops * elements, 2 * times * elements)


OPERATION = Operation(
    name="qk_norm_rope",
    shapes={
        "tiny": TINY,
        "check_many": {"T": 1601, "H": 12, "G": 4, "C": 128},  # 792 backward programs take two or three tokens each
        "check_wide": {"T": 33, "H": 4, "G": 2, "C": 256},
        **{f"T={tokens}": qwen3_30b_a3b(T=tokens) for tokens in (32768, 8192, 256)},
    },
    make_inputs=make_inputs,
    truth=truth,
    contenders={
        **every_implementation("qk_norm_rope", call),
        # Not the reference: it makes the sine and cosine of every element, which a model does once for all layers.
        "composed": Contender(lambda: composed),
        "composed_compiled": compiled(composed),
        "liger": Contender(liger, package="liger-kernel"),
    },
    work=work,
    differentiable=("q", "k", "q_norm_weight", "k_norm_weight"),
)
