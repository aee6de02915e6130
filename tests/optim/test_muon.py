"""Muon against torch's on matrices, per expert on stacks, and AdamW on the rest."""

import pytest
import torch
from torch import nn

from qwen3_lit.errors import UserError
from qwen3_lit.optim.muon import Muon, MuonFactory, orthogonalize
from qwen3_lit.optim.optimizer import build_optimizer
from qwen3_lit.optim.param_groups import OptimizerConfig


def test_singular_values_come_close_to_one() -> None:
    torch.manual_seed(0)
    for shape in ((4, 16, 12), (12, 16), (16, 12)):
        singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert singular.min() > 0.5 and singular.max() < 1.4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_equals_torch_muon_on_a_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    mine = Muon([{"params": [ours], "algorithm": "muon", "weight_decay": 0.1}], lr=0.02)
    torch_muon = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        torch_muon.step()
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
    assert (ours - 1).abs().mean() > 0.01


@pytest.mark.parametrize("row_blocks", [1, 2])
def test_a_stack_of_experts_is_its_experts_one_by_one(row_blocks: int) -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 8, 6))
    singles = [nn.Parameter(block.clone()) for expert in stack.detach() for block in expert.chunk(row_blocks)]
    together = Muon([{"params": [stack], "algorithm": "muon", "row_blocks": row_blocks}], lr=0.1)
    apart = Muon([{"params": singles, "algorithm": "muon"}], lr=0.1)
    for _ in range(3):
        stack.grad = torch.randn_like(stack)
        gradients = [block for expert in stack.grad for block in expert.chunk(row_blocks)]
        for single, gradient in zip(singles, gradients, strict=True):
            single.grad = gradient.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack, torch.cat(list(singles)).view_as(stack), atol=2e-3, rtol=0)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.proj = nn.Linear(4, 4)
        self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 4))
        self.gate = nn.Linear(4, 2, bias=False)


def test_factory_sorts_parameters_and_the_rest_equals_adamw() -> None:
    torch.manual_seed(0)
    model, reference = Tiny(), Tiny()
    reference.load_state_dict(model.state_dict())
    config = OptimizerConfig(learning_rate=0.05, factory=MuonFactory())
    optimizer = build_optimizer(model, config)
    found = {
        group["name"]: (group["algorithm"], group["row_blocks"], len(group["params"]))
        for group in optimizer.param_groups
    }
    assert found == {
        "matrix": ("muon", 1, 1),
        "gate_up": ("muon", 2, 1),
        "router": ("adamw", 1, 1),
        "embedding": ("adamw", 1, 1),
        "no_decay": ("adamw", 1, 1),
    }
    adamw = build_optimizer(reference, OptimizerConfig(learning_rate=0.05))
    for _ in range(3):
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(model.gate.weight, reference.gate.weight)
    torch.testing.assert_close(model.embed_tokens.weight, reference.embed_tokens.weight)
    torch.testing.assert_close(model.proj.bias, reference.proj.bias)
    assert not torch.allclose(model.proj.weight, reference.proj.weight)
    resumed = build_optimizer(Tiny(), config)
    resumed.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_bad_settings_are_user_errors() -> None:
    with pytest.raises(UserError):
        MuonFactory(momentum=1.0)
    with pytest.raises(UserError, match="2 or 3 dimensions"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))], "algorithm": "muon"}], lr=0.1)
