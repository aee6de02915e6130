"""Losses that pull a student towards a teacher's token distribution.

Full-vocabulary divergences and top-k forward KL are losses; the sampled-token reverse KL is an *advantage* (plain
back-propagation through it carries no teacher gradient). Dense functions take a chunk of logits; whole batches go
through `distillation_loss`, which never builds [T, V] tensors.

Directions: forward KL = KL(teacher || student), reverse KL = KL(student || teacher).
Legend: T tokens, D model width, V vocabulary, K teacher tokens kept per position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from qwen3_kernels import linear_logprob
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qwen3_lit.errors import UserError
from qwen3_lit.losses.reduction import masked_sum


def forward_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor) -> Tensor:
    """KL(teacher || student) at each token in nats [T]."""
    student_TV, teacher_TV = _log_probs(student_logits_TV), _log_probs(teacher_logits_TV)
    return _kl(teacher_TV, student_TV)


def reverse_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor) -> Tensor:
    """KL(student || teacher) at each token in nats [T]."""
    student_TV, teacher_TV = _log_probs(student_logits_TV), _log_probs(teacher_logits_TV)
    return _kl(student_TV, teacher_TV)


def generalized_jsd(student_logits_TV: Tensor, teacher_logits_TV: Tensor, beta: float) -> Tensor:
    """beta * KL(teacher || M) + (1 - beta) * KL(student || M), M = beta * teacher + (1 - beta) * student [T].

    beta 0 and 1 are the forward and the reverse KL by definition. Source: GKD (2306.13649), eq. 1 and section 2.

    Raises:
        UserError: beta outside [0, 1].
    """
    check_jsd_beta(beta)
    if beta == 0.0:
        return forward_kl(student_logits_TV, teacher_logits_TV)
    if beta == 1.0:
        return reverse_kl(student_logits_TV, teacher_logits_TV)
    student_TV, teacher_TV = _log_probs(student_logits_TV), _log_probs(teacher_logits_TV)
    weights = torch.tensor([beta, 1.0 - beta], dtype=student_TV.dtype, device=student_TV.device).log()
    mixture_TV = torch.logaddexp(teacher_TV + weights[0], student_TV + weights[1])
    return beta * _kl(teacher_TV, mixture_TV) + (1.0 - beta) * _kl(student_TV, mixture_TV)


def check_jsd_beta(beta: float) -> None:
    """Raises UserError unless 0 <= beta <= 1."""
    if not 0.0 <= beta <= 1.0:
        raise UserError(f"jsd_beta: got {beta}, expected a number in [0, 1] (0 forward KL, 1 reverse KL)")


def _log_probs(logits_TV: Tensor) -> Tensor:
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.log_softmax(logits_TV.to(dtype), dim=-1)


def _kl(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    # A token of probability zero (ln p = -inf) contributes nothing; 0 * -inf would be NaN.
    term_TV = p_TV.exp() * (p_TV - q_TV)
    return torch.where(p_TV == -torch.inf, torch.zeros_like(term_TV), term_TV).sum(-1)


@dataclass(frozen=True)
class TopKLogprobs:
    """Log-probs of K chosen tokens and of all other tokens together."""

    logprob_TK: Tensor
    tail_logprob_T: Tensor
    """ln of the probability mass outside the K tokens; -inf when there is none."""


def tail_logprob(logprob_TK: Tensor) -> Tensor:
    """ln(1 - sum of the K probabilities) [T], for stored teacher data; -inf when the K tokens hold everything."""
    mass_T = torch.logsumexp(logprob_TK.double(), dim=-1).clamp(max=0.0)
    return torch.log(-torch.expm1(mass_T)).to(logprob_TK.dtype)


def topk_logprobs(
    hidden_TD: Tensor,
    lm_head_weight_VD: Tensor,
    token_ids_TK: Tensor,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    chunk_size: int = 256,
) -> TopKLogprobs:
    """The student's log-probs of the teacher's K tokens and of the rest, differentiable.

    Logits are built and thrown away ``chunk_size`` tokens at a time (recomputed in the backward). The tail is a
    logsumexp over the other tokens, not 1 minus the sum, so that its gradient lives when the tail is tiny.
    """

    def chunk(hidden_CD: Tensor, weight_VD: Tensor, ids_CK: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = (hidden_CD @ weight_VD[:valid_vocab].T).float() / temperature
        normaliser_C = torch.logsumexp(logits_CV, dim=-1)
        chosen_CK = logits_CV.gather(-1, ids_CK) - normaliser_C[:, None]
        if ids_CK.shape[-1] >= logits_CV.shape[-1]:
            return chosen_CK, torch.full_like(normaliser_C, -torch.inf)
        others_CV = logits_CV.scatter(-1, ids_CK, -torch.inf)
        return chosen_CK, torch.logsumexp(others_CV, dim=-1) - normaliser_C

    parts = [
        checkpoint(chunk, hidden_CD, lm_head_weight_VD, ids_CK, use_reentrant=False, preserve_rng_state=False)
        for hidden_CD, ids_CK in zip(hidden_TD.split(chunk_size), token_ids_TK.split(chunk_size), strict=True)
    ]
    return TopKLogprobs(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))


def topk_forward_kl(student: TopKLogprobs, teacher: TopKLogprobs) -> Tensor:
    """KL(teacher || student) over K + 1 outcomes: the teacher's K tokens and one bucket for all others [T].

    Never negative, unlike a truncated sum without the bucket; a lower bound of the full forward KL.
    """
    bucket_T = teacher.tail_logprob_T.exp() * (teacher.tail_logprob_T - student.tail_logprob_T)
    empty_T = (teacher.tail_logprob_T == -torch.inf) | (student.tail_logprob_T == -torch.inf)
    bucket_T = torch.where(empty_T, torch.zeros_like(bucket_T), bucket_T)
    return _kl(teacher.logprob_TK, student.logprob_TK) + bucket_T


def reverse_kl_advantage(
    student_logprob_T: Tensor, teacher_logprob_T: Tensor, *, coefficient: float = 1.0, bound: float | None = None
) -> Tensor:
    """-coefficient * (ln student - ln teacher) at the sampled tokens, detached [T].

    Goes into a policy loss as the advantage: the policy gradient of the reverse KL on the student's own samples.

    Args:
        student_logprob_T: log-probs of the student that sampled the tokens, at temperature 1.
        teacher_logprob_T: the teacher's log-probs of the same tokens.
        coefficient: scale.
        bound: largest absolute advantage of one token; None leaves them unbounded.
    """
    advantage_T = -coefficient * (student_logprob_T.detach() - teacher_logprob_T.detach())
    return advantage_T if bound is None else advantage_T.clamp(-bound, bound)


@dataclass(frozen=True)
class DistillationLoss:
    """Scalar to call backward on, and the local divergence for the logs."""

    loss: Tensor
    divergence_sum: Tensor
    """Detached sum of the divergence over the local trained tokens in nats."""


def distillation_loss(
    hidden_TD: Tensor,
    lm_head_weight_VD: Tensor,
    teacher_hidden_TD: Tensor,
    teacher_weight_VD: Tensor,
    token_ids_T: Tensor,
    mask_T: Tensor,
    *,
    num_tokens_total: Tensor | float,
    jsd_beta: float = 0.0,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
) -> DistillationLoss:
    """Full-vocabulary divergence to a local teacher, summed over masked-in tokens / ``num_tokens_total``.

    Args:
        hidden_TD: the student's final hidden states; lm_head_weight_VD its head.
        teacher_hidden_TD: the teacher's, of its own width; teacher_weight_VD its head, cut to the same rows
        (`shared_head`). token_ids_T: any valid ids (the targets); only the divergence is read.
        mask_T: True where the token counts.
        num_tokens_total: tokens that count in the whole optimizer step.
        jsd_beta: 0 forward KL, 1 reverse KL, between generalized JSD.
        temperature: divides both models' logits.
        valid_vocab: rows of the heads that are real tokens.
    """
    check_jsd_beta(jsd_beta)
    result = linear_logprob(
        hidden_TD,
        lm_head_weight_VD,
        token_ids_T.clamp(min=0),
        temperature=temperature,
        valid_vocab=valid_vocab,
        teacher_hidden_TD=teacher_hidden_TD.detach(),
        teacher_weight_VD=teacher_weight_VD.detach(),
        jsd_beta=jsd_beta,
    )
    assert result.divergence_T is not None
    total = masked_sum(result.divergence_T, mask_T)
    return DistillationLoss(total / num_tokens_total, total.detach())


def shared_head(
    student_weight_VD: Tensor, teacher_weight_VD: Tensor, *, student_vocab: int, teacher_vocab: int
) -> tuple[Tensor, Tensor]:
    """Both heads cut to the tokenizer's size, so that rows that only pad one of them drop out.

    Args:
        student_weight_VD: head of the student, at least ``student_vocab`` rows.
        teacher_weight_VD: head of the teacher, at least ``teacher_vocab`` rows.
        student_vocab: size of the student's tokenizer.
        teacher_vocab: size of the teacher's tokenizer.

    Raises:
        UserError: tokenizers of different sizes (ids would mean different tokens), or a head smaller than its
        tokenizer.
    """
    if student_vocab != teacher_vocab:
        raise UserError(
            f"distillation: the student's tokenizer has {student_vocab} tokens and the teacher's {teacher_vocab}; "
            "expected the same tokenizer, take a teacher of the same family"
        )
    for name, weight_VD in (("student", student_weight_VD), ("teacher", teacher_weight_VD)):
        if weight_VD.shape[0] < student_vocab:
            raise UserError(
                f"distillation: the {name}'s output head has {weight_VD.shape[0]} rows "
                f"for a tokenizer of {student_vocab} tokens; the checkpoint and the tokenizer do not fit"
            )
    return student_weight_VD[:student_vocab], teacher_weight_VD[:student_vocab]
