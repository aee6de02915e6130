"""Cross-entropy with a global token count against a loop over tokens in float64."""

import math

import torch

from qwen3_lit.losses.language_model import language_model_loss


def slow(hidden, weight, targets, weights, z_weight, valid, total):
    loss, nll = torch.zeros((), dtype=torch.float64), 0.0
    for t in range(len(hidden)):
        if targets[t] < 0:
            continue
        logits = weight[:valid].double() @ hidden[t].double()
        normaliser = torch.log(torch.exp(logits).sum())
        token_nll = normaliser - logits[targets[t]]
        loss = loss + weights[t] * (token_nll + z_weight * normaliser**2)
        nll += token_nll.item()
    return loss / total, nll


def test_value_and_gradients_equal_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator, requires_grad=True)
    weight = torch.randn(32, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, 29, (13,), generator=generator)
    targets[[0, 5, 12]] = -100
    weights = torch.rand(13, generator=generator)
    result = language_model_loss(
        hidden, weight, targets, num_tokens_total=25.0, loss_weights_T=weights, z_loss_weight=0.01, valid_vocab=29
    )
    expected, nll = slow(hidden, weight, targets, weights, 0.01, 29, 25.0)
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert math.isclose(result.nll_sum.item(), nll, rel_tol=1e-5)
    assert result.num_tokens.item() == 10
    for ours, theirs in zip(
        torch.autograd.grad(result.loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_unequal_micro_batches_add_up_and_an_empty_one_is_harmless() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(12, 4, generator=generator), torch.randn(9, 4, generator=generator)
    targets = torch.randint(0, 9, (12,), generator=generator)
    targets[8:] = -100
    whole = language_model_loss(hidden, weight, targets)
    parts = [
        language_model_loss(hidden[part], weight, targets[part], num_tokens_total=torch.tensor(8)).loss
        for part in (slice(0, 3), slice(3, 8), slice(8, 12))
    ]
    torch.testing.assert_close(whole.loss, torch.stack(parts).sum())
    empty = language_model_loss(hidden[8:], weight, targets[8:])
    assert empty.loss.item() == 0.0
