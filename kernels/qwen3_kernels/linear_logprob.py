"""Log-probability of given tokens, entropy and divergence to a teacher, from hidden states, chunk by chunk.

Legend: T tokens, D model width, V vocabulary.
"""

from typing import NamedTuple

from torch import Tensor

from qwen3_kernels import dispatch, reference
from qwen3_kernels.head_products import check_valid_vocab


class LinearLogprob(NamedTuple):
    """Per-token values, float32, each differentiable in the hidden states and the head."""

    logprob_T: Tensor
    """log p(token) in nats."""
    entropy_T: Tensor
    """Entropy of the distribution in nats."""
    divergence_T: Tensor | None
    """Divergence between teacher and student in nats; None without a teacher."""


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_ids_T: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    teacher_hidden_TD: Tensor | None = None,
    teacher_weight_VD: Tensor | None = None,
    jsd_beta: float | None = None,
) -> LinearLogprob:
    """Score ``token_ids_T`` under ``softmax(hidden @ weight.T / temperature)``.

    Args:
        hidden_TD, weight_VD: activations and head, in dtypes of their own; the product is hidden's (autocast's, where
            that is on), everything after it is float32.
        token_ids_T: int64 in [0, V).
        temperature: divides the logits, the teacher's too.
        valid_vocab: rows of the heads from here on are padding and get no probability; teacher and student may
            differ in padding, not in this.
        teacher_hidden_TD, teacher_weight_VD: the teacher's (its own D and V); no gradient flows to them.
        jsd_beta: 0 is forward KL(teacher || student), 1 reverse KL(student || teacher), between them the generalised
            Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1).

    Raises:
        ValueError: ``valid_vocab`` is not between 1 and V, or the teacher is there in part.

    Compute bound: three products of 2 T V D FLOPs forward and backward; T = 16,384, V = 151,936 and D = 2,048 are
    30.6 TFLOP, 38.7 ms at 790 TFLOP/s on an H200. The fast path computes the logits again rather than keep them: 12.9
    ms forward, 38.7 backward. A teacher adds its own logits to both.
    """
    if (teacher_hidden_TD is None) != (jsd_beta is None) or (teacher_hidden_TD is None) != (teacher_weight_VD is None):
        raise ValueError("linear_logprob: teacher_hidden_TD, teacher_weight_VD and jsd_beta go together")
    check_valid_vocab("linear_logprob", weight_VD.shape[0], valid_vocab)
    hidden_TD = dispatch.autocast(hidden_TD)
    teacher_hidden_TD = None if teacher_hidden_TD is None else dispatch.autocast(teacher_hidden_TD)
    function = dispatch.choose("linear_logprob", hidden_TD)
    return LinearLogprob(
        *function(
            hidden_TD, weight_VD, token_ids_T, temperature, valid_vocab, teacher_hidden_TD, teacher_weight_VD, jsd_beta
        )
    )


if dispatch.HAS_TRITON:
    from qwen3_kernels import linear_logprob_triton

    dispatch.register("linear_logprob", "triton", linear_logprob_triton.run, dispatch.needs_float_triton)
dispatch.register("linear_logprob", "reference", reference.linear_logprob)
