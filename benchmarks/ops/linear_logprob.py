"""linear_logprob: log-probability of given tokens and entropy, from hidden states."""

import torch
import torch.nn.functional as F
from operation import Call, Contender, Inputs, Operation, Shape, Work, compiled, every_implementation, qwen3_30b_a3b
from qwen3_kernels import dispatch, linear_logprob
from torch import Tensor

TINY = {"T": 37, "D": 24, "V": 101}


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Logits of unit variance."""
    tokens, width, vocab = (shape[name] for name in "TDV")
    return {
        "hidden": torch.randn(tokens, width, device=device, dtype=dtype, generator=generator),
        "weight": torch.randn(vocab, width, device=device, dtype=dtype, generator=generator) * width**-0.5,
        "tokens": torch.randint(vocab, (tokens,), device=device, generator=generator),
    }


def call(inputs: Inputs) -> dict[str, Tensor]:
    scores = linear_logprob(inputs["hidden"], inputs["weight"], inputs["tokens"])
    return {"logprob": scores.logprob_T, "entropy": scores.entropy_T}


def truth(inputs: Inputs) -> dict[str, Tensor]:
    with dispatch.prefer("linear_logprob", "reference"):
        return call(inputs)


def whole_logits(inputs: Inputs) -> dict[str, Tensor]:
    """What a trainer without a fused operation does."""
    logp_TV = F.linear(inputs["hidden"], inputs["weight"]).float().log_softmax(-1)
    logprob_T = logp_TV.gather(-1, inputs["tokens"][:, None]).squeeze(-1)
    return {"logprob": logprob_T, "entropy": -(logp_TV.exp() * logp_TV).sum(-1)}


def cut_cross_entropy(filter_eps: str | None = "high") -> Call:
    """Log-probabilities alone: it has no entropy. By default it drops gradients of improbable tokens."""
    from cut_cross_entropy import linear_cross_entropy as cut

    def run(inputs: Inputs) -> dict[str, Tensor]:
        return {
            "logprob": -cut(
                inputs["hidden"], inputs["weight"], inputs["tokens"], reduction="none", filter_eps=filter_eps
            ).float()
        }

    return run


def work(shape: Shape, direction: str) -> Work:
    """One product forward, two backward; logits computed again in the backward pass are not counted."""
    tokens, width, vocab = (shape[name] for name in "TDV")
    products, head, hidden = 2 * tokens * width * vocab, 2 * width * vocab, 2 * tokens * width
    times = {"forward": (1, 1), "backward": (2, 2), "both": (3, 3)}
    flops, reads = times[direction]
    return Work(flops * products, reads * (head + hidden))


OPERATION = Operation(
    name="linear_logprob",
    shapes={"tiny": TINY, "T=16384": qwen3_30b_a3b(T=16384)},
    make_inputs=make_inputs,
    truth=truth,
    contenders={
        **every_implementation("linear_logprob", call),
        "whole_logits": Contender(lambda: whole_logits),
        "whole_logits_compiled": compiled(whole_logits),
        "cut_cross_entropy": Contender(cut_cross_entropy, package="cut-cross-entropy", tolerance=0.1),
        "cut_cross_entropy_exact": Contender(lambda: cut_cross_entropy(None), package="cut-cross-entropy"),
    },
    work=work,
    differentiable=("hidden", "weight"),
)
