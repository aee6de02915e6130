"""The sampler draws from the distribution it reports."""

import numpy as np
import pytest
import torch

from qwen3_lit.generation.sampler import (
    FilterTensors,
    SamplingTensors,
    draw_uniforms,
    filter_logits,
    sample_inverse_cdf,
    sample_tokens,
)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Statistic over the cells with an expectation of at least five, the rest pooled."""
    expected = probabilities.double() * counts.sum()
    small = expected < 5
    observed = torch.cat([counts[~small], counts[small].sum()[None]]).double()
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = expected > 0
    assert observed[~keep].sum() == 0
    return float(((observed - expected) ** 2 / expected.clamp_min(1e-300))[keep].sum()), int(keep.sum()) - 1


def params(rows: int, temperature: float = 1.0, filters: FilterTensors | None = None) -> SamplingTensors:
    return SamplingTensors(torch.full((rows,), temperature), temperature == 0, temperature > 0, filters)


def filters(rows: int, top_p: float = 1, top_k: int = 0, min_p: float = 0, penalty: float = 0) -> FilterTensors:
    return FilterTensors(
        torch.full((rows,), top_p), torch.full((rows,), top_k), torch.full((rows,), min_p), torch.full((rows,), penalty)
    )


def test_uniforms_are_uniform_and_independent() -> None:
    keys, counters = np.meshgrid(np.arange(-200, 200), np.arange(250), indexing="ij")
    uniforms = draw_uniforms(keys.ravel(), counters.ravel()).reshape(keys.shape)
    assert uniforms.min() > 0 and uniforms.max() < 1
    counts = np.bincount((uniforms.ravel() * 100).astype(int), minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # 99 degrees of freedom, p < 1e-4
    for neighbour in (uniforms[1:] * uniforms[:-1], uniforms[:, 1:] * uniforms[:, :-1]):
        assert abs(neighbour.mean() - 0.25) < 0.003
    assert len(np.unique(uniforms)) == uniforms.size


def test_uniform_depends_on_key_and_counter_only() -> None:
    together = draw_uniforms(np.array([3, -7, 11]), np.array([5, 0, 9]))
    alone = [draw_uniforms(np.array([k]), np.array([c]))[0] for k, c in ((3, 5), (-7, 0), (11, 9))]
    assert together.tolist() == alone


@pytest.mark.parametrize("width", [1, 5, 64, 150])
def test_samples_follow_the_softmax(width: int) -> None:
    torch.manual_seed(width)
    logits = torch.randn(width) * 2
    rows = 40_000
    uniforms = torch.from_numpy(draw_uniforms(np.arange(rows), np.zeros(rows, dtype=np.int64)))
    tokens, normalizer = sample_inverse_cdf(logits.expand(rows, -1), uniforms)
    torch.testing.assert_close(normalizer[0], logits.logsumexp(-1))
    statistic, freedom = chi_square(torch.bincount(tokens, minlength=width), logits.softmax(-1))
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8


def test_extreme_uniforms_never_pick_an_impossible_token() -> None:
    logits = torch.full((2, 200), -torch.inf)
    logits[:, [63, 64, 130]] = torch.tensor([0.0, -1.0, -60.0])
    tokens, _ = sample_inverse_cdf(logits, torch.tensor([2.0**-54, 1 - 2.0**-53], dtype=torch.float64))
    assert tokens.tolist() == [63, 64]


def test_large_vocabulary_keeps_its_tail() -> None:
    logits = torch.zeros(1, 151_669)
    quantiles = torch.tensor([0.1, 0.5, 0.999999], dtype=torch.float64)
    tokens, _ = sample_inverse_cdf(logits.expand(3, -1), quantiles)
    assert tokens.tolist() == (quantiles * 151_669).long().tolist()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprob_is_at_the_sampling_temperature(temperature: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(32, 99) * 3
    tokens, logprobs = sample_tokens(logits, torch.rand(32, dtype=torch.float64), params(32, temperature))
    expected = (logits / temperature).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, expected)


def test_greedy_rows_and_forced_rows_in_one_batch() -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, 50)
    mixed = SamplingTensors(torch.tensor([0.0, 1.0, 0.0, 1.0]), True, True, None)
    forced = torch.tensor([-1, -1, 7, 99])
    tokens, logprobs = sample_tokens(logits, torch.full((4,), 0.5, dtype=torch.float64), mixed, forced_B=forced)
    assert tokens[0] == logits[0].argmax() and tokens[2] == 7 and tokens[3] == 99
    torch.testing.assert_close(logprobs[:3], logits.log_softmax(-1)[:3].gather(1, tokens[:3, None]).squeeze(1))
    assert logprobs[3] == -torch.inf  # 99 is not in the vocabulary


def reference_filter(probabilities: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    if top_k:
        order = order[:top_k]
    mass = sum(probabilities[i] for i in order)
    kept, before = [], 0.0
    for i in order:
        if before / mass < top_p or top_p >= 1:
            kept.append(i)
        before += probabilities[i]
    return {i for i in kept if probabilities[i] >= min_p * probabilities[order[0]]}


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 0.7, 0), (5, 1, 0), (0, 1, 0.2), (10, 0.8, 0.1), (1, 0.1, 0)]
)
def test_filters_keep_the_right_tokens(top_k: int, top_p: float, min_p: float) -> None:
    torch.manual_seed(3)
    logits = torch.randn(6, 40)
    kept = filter_logits(logits, filters(6, top_p, top_k, min_p)).isfinite()
    for row in range(6):
        assert set(kept[row].nonzero().flatten().tolist()) == reference_filter(
            logits[row].softmax(-1).tolist(), top_k, top_p, min_p
        )


def test_presence_penalty_changes_the_choice_but_not_the_logprob() -> None:
    logits = torch.tensor([[2.0, 1.5, -9.0]])
    seen = torch.tensor([[True, False, False]])
    tokens, logprobs = sample_tokens(
        logits, torch.tensor([0.5], dtype=torch.float64), params(1, 0.0, filters(1, penalty=1.0)), seen_BV=seen
    )
    assert tokens.item() == 1
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 1])
