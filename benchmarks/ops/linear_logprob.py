"""linear_logprob: log-probability of given tokens and entropy, from hidden states; with a teacher its divergence.

With a teacher (KL(teacher || student), the ``jsd_beta`` 0 of Liger and of ours) the mean divergence is all that is
asked for, because Liger's has nothing else. It makes its gradients in the forward pass, so the training step is what
compares.
"""

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
from qwen3_kernels import dispatch, linear_logprob
from torch import Tensor

TINY = {"T": 37, "D": 24, "V": 101}
CHECK = {"T": 300, "D": 64, "V": 10000}
TEACHER_WIDTH = 4096
"""Qwen3-235B-A22B's, which has the same vocabulary."""
FORWARD_KL = 0.0


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Logits of unit variance, the teacher's too."""
    tokens, vocab = shape["T"], shape["V"]

    def model(width: int) -> tuple[Tensor, Tensor]:
        hidden_TD = torch.randn(tokens, width, device=device, dtype=dtype, generator=generator)
        return hidden_TD, torch.randn(vocab, width, device=device, dtype=dtype, generator=generator) * width**-0.5

    inputs: Inputs = dict(zip(("hidden", "weight"), model(shape["D"]), strict=True))
    if "teacher" in shape:
        inputs |= dict(zip(("teacher_hidden", "teacher_weight"), model(shape["teacher"]), strict=True))
    return inputs | {"tokens": torch.randint(vocab, (tokens,), device=device, generator=generator)}


def call(inputs: Inputs) -> dict[str, Tensor]:
    student = inputs["hidden"], inputs["weight"], inputs["tokens"]
    if "teacher_hidden" not in inputs:
        scores = linear_logprob(*student)
        return {"logprob": scores.logprob_T, "entropy": scores.entropy_T}
    scores = linear_logprob(
        *student,
        teacher_hidden_TD=inputs["teacher_hidden"],
        teacher_weight_VD=inputs["teacher_weight"],
        jsd_beta=FORWARD_KL,
    )
    assert scores.divergence_T is not None
    return {"divergence": scores.divergence_T.mean()}


def truth(inputs: Inputs) -> dict[str, Tensor]:
    with dispatch.prefer("linear_logprob", "reference"):
        return call(inputs)


def whole_logits(inputs: Inputs) -> dict[str, Tensor]:
    """What a trainer without a fused operation does."""
    logp_TV = F.linear(inputs["hidden"], inputs["weight"]).float().log_softmax(-1)
    if "teacher_hidden" in inputs:
        teacher_TV = F.linear(inputs["teacher_hidden"], inputs["teacher_weight"]).float().log_softmax(-1)
        return {"divergence": F.kl_div(logp_TV, teacher_TV, reduction="batchmean", log_target=True)}
    logprob_T = logp_TV.gather(-1, inputs["tokens"][:, None]).squeeze(-1)
    return {"logprob": logprob_T, "entropy": -(logp_TV.exp() * logp_TV).sum(-1)}


def liger(accum_dtype: torch.dtype | None = None) -> Call:
    """With its defaults, as its users run it, or with float32 accumulation of the head's gradient."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    def run(inputs: Inputs) -> dict[str, Tensor]:
        models = [inputs[name] for name in ("hidden", "weight", "teacher_hidden", "teacher_weight")]
        return {"divergence": liger_fused_linear_jsd(*models, jsd_beta=FORWARD_KL, accum_dtype=accum_dtype)}

    return run


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


def only_teacher(shape: Shape) -> str | None:
    return None if "teacher" in shape else "it has a divergence alone"


def only_student(shape: Shape) -> str | None:
    return "it has no divergence" if "teacher" in shape else None


def work(shape: Shape, direction: str) -> Work:
    """One product forward, two backward, and the teacher's own; logits computed again in the backward pass are not
    counted."""
    tokens, width, vocab = (shape[name] for name in "TDV")
    products, inputs = 2 * tokens * width * vocab, 2 * width * (vocab + tokens)
    times = {"forward": 1, "backward": 2, "both": 3}[direction]
    teacher = shape.get("teacher", 0) / width if direction != "backward" else 0
    return Work((times + teacher) * products, (times + teacher) * inputs)


OPERATION = Operation(
    name="linear_logprob",
    shapes={
        "tiny": TINY,
        "tiny_teacher": {**TINY, "teacher": 40},
        "check_blocks": CHECK,
        "check_blocks_teacher": {**CHECK, "teacher": 96},
        "T=16384": qwen3_30b_a3b(T=16384),
        "T=8192_teacher": qwen3_30b_a3b(T=8192, teacher=TEACHER_WIDTH),
    },
    make_inputs=make_inputs,
    truth=truth,
    contenders={
        **every_implementation("linear_logprob", call, on_request=("reference",)),
        "whole_logits": Contender(lambda: whole_logits),
        "whole_logits_compiled": compiled(whole_logits),
        "liger": Contender(liger, package="liger-kernel", only_shapes=only_teacher, tolerance=0.1),  # sums in bfloat16
        "liger_float32_sum": Contender(lambda: liger(torch.float32), package="liger-kernel", only_shapes=only_teacher),
        "cut_cross_entropy": Contender(
            cut_cross_entropy, package="cut-cross-entropy", only_shapes=only_student, tolerance=0.1
        ),
        "cut_cross_entropy_exact": Contender(
            lambda: cut_cross_entropy(None), package="cut-cross-entropy", only_shapes=only_student
        ),
    },
    work=work,
    differentiable=("hidden", "weight"),
    directions=lambda shape: ("both",) if "teacher" in shape else DIRECTIONS,
)
