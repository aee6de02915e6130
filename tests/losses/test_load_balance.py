"""Global-batch balance against the formula on the whole batch in one piece; the bias rule; router metrics."""

import copy
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwen3_lit.errors import UserError
from qwen3_lit.losses.load_balance import (
    AuxFreeBias,
    CombinedBalance,
    GlobalBatchBalance,
    MicroBatchBalance,
    RouterZLoss,
    balance_loss,
    updated_expert_bias,
)
from qwen3_lit.losses.router_metrics import dead_expert_fraction, load_cv, load_entropy, max_violation, router_metrics

LAYERS, EXPERTS, TOP_K, WIDTH = 3, 6, 2, 5


@dataclass
class Stats:
    counts_LE: Tensor
    prob_sum_LE: Tensor
    z_sum_L: Tensor
    num_tokens: Tensor


class Routers(nn.Module):
    """One router a layer, statistics returned as values; optionally recomputed in the backward."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight_LDE = nn.Parameter(torch.randn(LAYERS, WIDTH, EXPERTS, generator=generator, dtype=torch.float64))
        self.recompute, self.forwards = recompute, 0

    def layer(self, x_TD: Tensor, weight_DE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.forwards += 1
        logits_TE = x_TD @ weight_DE
        prob_TE = logits_TE.softmax(-1)
        ids_TK = prob_TE.topk(TOP_K, -1).indices
        counts_E = torch.bincount(ids_TK.flatten(), minlength=EXPERTS)
        return counts_E, prob_TE.sum(0), torch.logsumexp(logits_TE, -1).square().sum()

    def forward(self, x_TD: Tensor) -> Stats:
        run = (lambda x, w: checkpoint(self.layer, x, w, use_reentrant=False)) if self.recompute else self.layer
        layers = [run(x_TD, self.weight_LDE[i]) for i in range(LAYERS)]
        counts, probs, z = (torch.stack(column) for column in zip(*layers, strict=True))
        return Stats(counts, probs, z, torch.tensor(len(x_TD)))


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_balance(model: Routers, x_TD: Tensor) -> Tensor:
    """Layer by layer, token by token, expert by expert."""
    losses = []
    for layer in range(LAYERS):
        prob_TE = (x_TD @ model.weight_LDE[layer]).softmax(-1)
        loss = torch.zeros((), dtype=torch.float64)
        for expert in range(EXPERTS):
            chosen = sum(int(expert in prob_TE[t].topk(TOP_K).indices.tolist()) for t in range(len(x_TD)))
            loss = loss + EXPERTS * (chosen / (TOP_K * len(x_TD))) * prob_TE[:, expert].sum() / len(x_TD)
        losses.append(loss)
    return sum(losses) / LAYERS


def gradient(loss: Tensor, model: Routers) -> Tensor:
    return torch.autograd.grad(loss, model.weight_LDE)[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_one_micro_batch_equals_the_formula(recompute: bool) -> None:
    model, x_TD = Routers(recompute), tokens(40)
    slow = slow_balance(model, x_TD)
    slow_gradient = gradient(slow, model)
    loss = GlobalBatchBalance(weight=0.5).loss(model(x_TD))
    torch.testing.assert_close(loss, 0.5 * slow, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(loss, model), 0.5 * slow_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("recompute", [False, True])
def test_unequal_accumulation(recompute: bool) -> None:
    """Counts of earlier micro-steps are in f, probabilities weigh by tokens, and recomputation counts nothing twice."""
    model, x_TD = Routers(recompute), tokens(60)
    parts = x_TD.split([7, 33, 20])
    strategy = GlobalBatchBalance(weight=1.0)
    seen = torch.zeros(LAYERS, EXPERTS, dtype=torch.float64)
    for part in parts:
        stats = model(part)
        seen = seen + stats.counts_LE
        expected = balance_loss(stats.prob_sum_LE, seen, 60)
        expected_gradient = torch.autograd.grad(expected, model.weight_LDE, retain_graph=True)[0]
        loss = strategy.loss(stats, num_tokens_total=60)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(loss, model), expected_gradient)
    torch.testing.assert_close(seen, strategy.state_dict()["counts_LE"].double())
    if recompute:
        assert model.forwards > LAYERS * len(parts)
    # With f final, contributions of unequal parts add up to the whole batch's loss and gradient.
    total = sum((balance_loss(model(part).prob_sum_LE, seen, 60) for part in parts), torch.zeros(()))
    slow = slow_balance(model, x_TD)
    torch.testing.assert_close(total, slow, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(total, model), gradient(slow, model), rtol=1e-5, atol=1e-8)
    strategy.after_optimizer_step()
    fresh = GlobalBatchBalance(weight=1.0).loss(model(parts[0]), 60)
    torch.testing.assert_close(strategy.loss(model(parts[0]), 60), fresh)


def test_state_resumes_between_micro_steps() -> None:
    model, parts = Routers(), tokens(30).split([10, 20])
    strategy, resumed = GlobalBatchBalance(), GlobalBatchBalance()
    strategy.loss(model(parts[0]), 30)
    resumed.load_state_dict(copy.deepcopy(strategy.state_dict()))
    torch.testing.assert_close(resumed.loss(model(parts[1]), 30), strategy.loss(model(parts[1]), 30))


def test_balanced_is_one_collapsed_is_large_and_layers_do_not_cancel() -> None:
    balanced = balance_loss(torch.full((2, 8), 4.0), torch.full((2, 8), 8), 32)
    assert balanced.item() == pytest.approx(1.0)
    # Each layer collapsed on its own half: pooled over layers it would look balanced.
    collapsed = torch.zeros(2, 8)
    collapsed[0, :4] = collapsed[1, 4:] = 1.0
    assert balance_loss(collapsed * 8.0, collapsed * 16, 32).item() == pytest.approx(2.0)


def test_micro_batch_balance_forgets_other_micro_steps() -> None:
    model, parts = Routers(), tokens(30).split([10, 20])
    strategy = MicroBatchBalance(weight=1.0)
    strategy.loss(model(parts[0]))
    torch.testing.assert_close(strategy.loss(model(parts[1])), slow_balance(model, parts[1]), rtol=1e-6, atol=0)


def test_combined_adds_the_router_z_loss() -> None:
    model, x_TD = Routers(), tokens(20)
    combined = CombinedBalance([GlobalBatchBalance(0.25), RouterZLoss(0.5)])
    z = torch.stack([torch.logsumexp(x_TD @ model.weight_LDE[i], -1).square().mean() for i in range(LAYERS)]).mean()
    expected = 0.25 * slow_balance(model, x_TD) + 0.5 * z
    torch.testing.assert_close(combined.loss(model(x_TD)), expected, rtol=1e-6, atol=0)
    combined.load_state_dict(combined.state_dict())
    with pytest.raises(UserError):
        CombinedBalance([])


class BiasedRouters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(LAYERS))
        for layer in self.layers:
            layer.register_buffer("expert_bias_E", torch.zeros(EXPERTS))


def test_aux_free_bias_moves_against_the_load_of_the_whole_step() -> None:
    counts_LE = torch.tensor([[4, 0, 2], [2, 2, 2]])
    moved = updated_expert_bias(torch.zeros(2, 3), counts_LE, 0.1)
    torch.testing.assert_close(moved, torch.tensor([[-0.1, 0.1, 0.0], [0.0, 0.0, 0.0]]))
    model, routers, strategy = BiasedRouters(), Routers(), AuxFreeBias(rate=0.5)
    parts = tokens(50).split([20, 30])
    total = sum(routers(part).counts_LE for part in parts)
    for part in parts:
        assert strategy.loss(routers(part)).item() == 0.0
    strategy.after_optimizer_step(model)
    expected = updated_expert_bias(torch.zeros(LAYERS, EXPERTS), total, 0.5)
    torch.testing.assert_close(torch.stack([layer.expert_bias_E for layer in model.layers]), expected)
    before = model.layers[0].expert_bias_E.clone()
    strategy.after_optimizer_step(model)
    torch.testing.assert_close(model.layers[0].expert_bias_E, before)
    strategy.loss(routers(parts[0]))
    with pytest.raises(UserError, match="expert_bias_E"):
        strategy.after_optimizer_step(routers)


def test_router_metrics_by_hand() -> None:
    counts_LE = torch.tensor([[4, 0, 0, 0], [1, 1, 1, 1], [3, 1, 0, 0]])
    torch.testing.assert_close(max_violation(counts_LE), torch.tensor([3.0, 0.0, 2.0]))
    torch.testing.assert_close(load_cv(counts_LE), torch.tensor([math.sqrt(3), 0.0, math.sqrt(1.5)]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    torch.testing.assert_close(load_entropy(counts_LE), torch.tensor([0.0, 1.0, entropy]))
    torch.testing.assert_close(dead_expert_fraction(counts_LE), torch.tensor([0.75, 0.0, 0.5]))
    metrics = router_metrics(counts_LE, torch.ones(3, 4), torch.tensor([8.0, 4.0, 0.0]), torch.tensor(4))
    assert metrics["max_violation_worst_layer"].item() == 3.0
    assert metrics["router_z"].item() == pytest.approx(1.0)
    assert metrics["balance"].item() == pytest.approx(1.0)


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """Unequal ranks, two unequal micro-steps: the last micro-step's f is the global batch's; gradients add up."""
    script = Path(__file__).with_name("balance_rank.py")
    processes = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    model, x_TD = Routers(), tokens(60)
    parts = x_TD.split([5, 15, 30, 10])  # (rank 0, step 0), (rank 1, step 0), (rank 0, step 1), (rank 1, step 1)
    counts = [model(part).counts_LE for part in parts]
    step_counts = [counts[0] + counts[1], sum(counts)]
    expected = torch.zeros(())
    for index, part in enumerate(parts):
        expected = expected + balance_loss(model(part).prob_sum_LE, step_counts[index // 2], 60)
    torch.testing.assert_close(results[0]["loss"] + results[1]["loss"], expected)
    torch.testing.assert_close(results[0]["gradient"] + results[1]["gradient"], gradient(expected, model))
    for result in results:
        torch.testing.assert_close(result["counts_LE"], step_counts[1])
