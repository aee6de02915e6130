"""Divergences against loops in float64, the tail bucket, the kernel-backed loss, and heads that do not fit."""

import math

import pytest
import torch

from qwen3_lit.errors import UserError
from qwen3_lit.losses.distillation import (
    TopKLogprobs,
    distillation_loss,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    reverse_kl_advantage,
    shared_head,
    tail_logprob,
    topk_forward_kl,
    topk_logprobs,
)

T, V, D = 7, 11, 6


def logits(seed: int) -> torch.Tensor:
    return 2 * torch.randn(T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_divergence(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    rows = []
    for t in range(len(student)):
        q = torch.exp(student[t]) / torch.exp(student[t]).sum()
        p = torch.exp(teacher[t]) / torch.exp(teacher[t]).sum()
        total = torch.zeros((), dtype=torch.float64)
        for v in range(len(p)):
            if beta == 0:
                total = total + p[v] * torch.log(p[v] / q[v])
            elif beta == 1:
                total = total + q[v] * torch.log(q[v] / p[v])
            else:
                m = beta * p[v] + (1 - beta) * q[v]
                total = total + beta * p[v] * torch.log(p[v] / m) + (1 - beta) * q[v] * torch.log(q[v] / m)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_divergences_equal_the_loop(beta: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    ours, expected = generalized_jsd(student, teacher, beta), slow_divergence(student, teacher, beta)
    torch.testing.assert_close(ours, expected)
    ours_gradient = torch.autograd.grad(ours.sum(), student)[0]
    torch.testing.assert_close(ours_gradient, torch.autograd.grad(expected.sum(), student)[0])


def test_names_are_the_right_way_round() -> None:
    student, teacher = logits(0), logits(1)
    torch.testing.assert_close(forward_kl(student, teacher), slow_divergence(student, teacher, 0.0))
    torch.testing.assert_close(reverse_kl(student, teacher), slow_divergence(student, teacher, 1.0))
    # A teacher that excludes a token is no trouble for the forward direction.
    teacher[:, 0] = -torch.inf
    assert forward_kl(student, teacher).isfinite().all()
    with pytest.raises(UserError):
        generalized_jsd(student, teacher, 1.5)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_kernel_backed_loss_equals_the_dense_one(beta: float) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(T, D, generator=generator, requires_grad=True)
    weight = torch.randn(V + 5, D, generator=generator, requires_grad=True)
    teacher_hidden, teacher_weight = torch.randn(T, 4, generator=generator), torch.randn(V, 4, generator=generator)
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 1])
    student_head, teacher_head = shared_head(weight, teacher_weight, student_vocab=V, teacher_vocab=V)
    ids = torch.tensor([1, -100, 2, 3, 4, -100, 5])
    result = distillation_loss(
        hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        ids,
        mask,
        num_tokens_total=9,
        jsd_beta=beta,
        temperature=0.7,
    )
    student_logits = (hidden @ weight[:V].T).double() / 0.7
    dense = slow_divergence(student_logits, (teacher_hidden @ teacher_weight.T).double() / 0.7, beta)
    expected = dense[mask.bool()].sum() / 9
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(result.loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("k", [1, 4, V])
def test_topk_with_tail_equals_the_loop(k: int) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = logits(5).log_softmax(-1)
    top = teacher.topk(k, -1)
    teacher_top = TopKLogprobs(top.values, tail_logprob(top.values))
    ours = topk_forward_kl(topk_logprobs(hidden, weight, top.indices, temperature=0.8, chunk_size=3), teacher_top)
    rows = []
    for t in range(T):
        q, p = torch.softmax(weight @ hidden[t] / 0.8, 0), teacher[t].exp()
        kept = top.indices[t].tolist()
        total = sum(p[v] * torch.log(p[v] / q[v]) for v in kept)
        rest = [v for v in range(V) if v not in kept]
        if rest:
            total = total + p[rest].sum() * torch.log(p[rest].sum() / q[rest].sum())
        rows.append(total)
    expected = torch.stack(rows)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    assert (ours >= -1e-6).all()
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (hidden, weight)),
        torch.autograd.grad(expected.sum(), (hidden, weight)),
        strict=True,
    ):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_reverse_kl_advantage_is_its_policy_gradient() -> None:
    """Exact expectation over the vocabulary: E_student[advantage * grad ln student] = -grad KL(student || teacher)."""
    student, teacher = logits(6)[:1].requires_grad_(), logits(7)[:1]
    student_lp, teacher_lp = student.log_softmax(-1)[0], teacher.log_softmax(-1)[0]
    advantage = reverse_kl_advantage(student_lp, teacher_lp)
    policy = (student_lp.detach().exp() * advantage * student_lp).sum()
    (policy_gradient,) = torch.autograd.grad(policy, student, retain_graph=True)
    (kl_gradient,) = torch.autograd.grad(reverse_kl(student, teacher).sum(), student)
    torch.testing.assert_close(policy_gradient, -kl_gradient)
    bounded = reverse_kl_advantage(torch.tensor([0.0]), torch.tensor([-9.0]), coefficient=2.0, bound=5.0)
    assert bounded.item() == -5.0


def test_tail_of_a_complete_set_is_empty() -> None:
    full = torch.tensor([[0.5, 0.5]]).log()
    assert tail_logprob(full).item() == -math.inf or tail_logprob(full).exp().item() < 1e-6


def test_heads_that_do_not_fit_are_user_errors() -> None:
    head = torch.zeros(8, 2)
    with pytest.raises(UserError, match="same tokenizer"):
        shared_head(head, head, student_vocab=8, teacher_vocab=7)
    with pytest.raises(UserError, match="8 rows"):
        shared_head(head, head, student_vocab=9, teacher_vocab=9)
