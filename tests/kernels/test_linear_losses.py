"""The chunked head operations against the whole [T, V] in float64, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from qwen3_kernels import linear_cross_entropy, linear_logprob, reference


@pytest.fixture(params=[1 << 24, 64], ids=["one chunk", "many chunks"])
def chunk_elements(request, monkeypatch):
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", request.param)


def problem(tokens=13, width=6, vocab=17):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    return hidden, weight, targets


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
@pytest.mark.parametrize("valid_vocab", [None, 15])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_and_gradients(chunk_elements, z_loss_weight, valid_vocab, weighted):
    hidden, weight, targets = problem()
    targets = targets.clamp(max=14)
    targets[[2, 12]] = -100
    loss_weights = torch.rand(13) if weighted else None
    result = linear_cross_entropy(
        hidden, weight, targets, loss_weights_T=loss_weights, z_loss_weight=z_loss_weight, valid_vocab=valid_vocab
    )
    logits = (hidden.double() @ weight.double().t())[:, :valid_vocab]
    nll = F.cross_entropy(logits, targets, reduction="none")
    kept = (targets != -100).double()
    factor = kept if loss_weights is None else kept * loss_weights.double()
    expected = ((nll + z_loss_weight * logits.logsumexp(-1) ** 2) * factor).sum()
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.nll_T.double(), nll.detach(), rtol=1e-5, atol=1e-5)
    ours_all = torch.autograd.grad(3 * result.loss, (hidden, weight))
    for ours, theirs in zip(ours_all, torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_loss_is_not_rounded_to_the_type_of_the_hidden_states():
    """1 / 7777 in bfloat16 is 0.1 % off, which would make another factor for the backbone than for the head."""
    hidden, weight, targets = problem()
    hidden = hidden.detach().bfloat16().requires_grad_()
    whole, part = (
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).loss * factor, hidden)[0].float()
        for factor in (1.0, 1 / 7777)
    )
    assert (part * 7777 / whole).mean().sub(1).abs() < 4e-4


def test_cross_entropy_of_no_token_is_zero():
    hidden, weight, targets = problem()
    result = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert result.loss == 0
    grad, _ = torch.autograd.grad(result.loss, (hidden, weight))
    assert grad.abs().max() == 0


@pytest.mark.parametrize("jsd_beta", [None, 0.0, 0.3, 1.0])
def test_logprob_entropy_divergence_and_gradients(chunk_elements, jsd_beta):
    hidden, weight, tokens = problem()
    tokens = tokens.clamp(max=14)
    teacher = {}
    if jsd_beta is not None:
        teacher = {"teacher_hidden_TD": torch.randn(13, 4), "teacher_weight_VD": torch.randn(19, 4)}
        teacher["jsd_beta"] = jsd_beta
    result = linear_logprob(hidden, weight, tokens, temperature=0.7, valid_vocab=15, **teacher)
    logp = ((hidden.double() @ weight.double().t())[:, :15] / 0.7).log_softmax(-1)
    expected = [logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)]
    ours = [result.logprob_T, result.entropy_T]
    if jsd_beta is not None:
        t = (teacher["teacher_hidden_TD"].double() @ teacher["teacher_weight_VD"].double().t())[:, :15] / 0.7
        p, q = t.softmax(-1), logp.exp()
        m = jsd_beta * p + (1 - jsd_beta) * q
        kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
        if jsd_beta == 0:
            expected.append(kl(p, q))
        elif jsd_beta == 1:
            expected.append(kl(q, p))
        else:
            expected.append(jsd_beta * kl(p, m) + (1 - jsd_beta) * kl(q, m))
        ours.append(result.divergence_T)
    else:
        assert result.divergence_T is None
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(x.sum(), (hidden, weight), retain_graph=True) for x in (a, b)]
        for g, h in zip(*grads, strict=True):
            torch.testing.assert_close(g, h.float(), rtol=1e-3, atol=1e-4)


def test_teacher_arguments_go_together():
    hidden, weight, tokens = problem()
    with pytest.raises(ValueError, match="go together"):
        linear_logprob(hidden, weight, tokens, jsd_beta=0.5)


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprob])
@pytest.mark.parametrize("valid_vocab", [0, 18, -1])
def test_a_valid_vocabulary_that_the_head_has_not_is_refused(op, valid_vocab):
    hidden, weight, tokens = problem()
    with pytest.raises(ValueError, match=f"{op.__name__}: valid_vocab is {valid_vocab}, expected between 1 and .* 17 "):
        op(hidden, weight, tokens, valid_vocab=valid_vocab)


@pytest.mark.parametrize("jsd_beta", [None, 0.3])
def test_autocast_casts_the_hidden_states_and_no_gradient(chunk_elements, jsd_beta):
    """Losses and gradients of hidden states cast by hand, in the types of what was handed over."""
    hidden, weight, tokens = problem()
    teacher = {}
    if jsd_beta is not None:
        teacher = {"teacher_hidden_TD": torch.randn(13, 4), "teacher_weight_VD": torch.randn(17, 4)}
        teacher["jsd_beta"] = jsd_beta

    def results(hidden, teacher_hidden):
        options = {**teacher, "teacher_hidden_TD": teacher_hidden} if teacher else {}
        scores = linear_logprob(hidden, weight, tokens, **options)
        losses = [linear_cross_entropy(hidden, weight, tokens).loss, *(x.sum() for x in scores if x is not None)]
        # Each alone: the sum of several gradients would be rounded once more by hand than under autocast.
        return [*losses, *(g for x in losses for g in torch.autograd.grad(x, (hidden, weight), retain_graph=True))]

    teacher_hidden = teacher.get("teacher_hidden_TD")
    by_hand = teacher_hidden if teacher_hidden is None else teacher_hidden.bfloat16()
    expected = results(hidden.detach().bfloat16().requires_grad_(), by_hand)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(hidden, teacher_hidden)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-6)
