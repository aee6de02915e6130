"""A whole model under autocast, as ``precision: bf16-mixed`` trains it: types at every operation, experts chosen."""

import pytest
import torch
import torch.nn.functional as F
from qwen3_kernels import dispatch, linear_cross_entropy
from torch import Tensor

from qwen3_lit.model.config import DualChunkConfig, ModelConfig
from qwen3_lit.model.moe import Router
from qwen3_lit.model.transformer import Qwen3

LENGTHS = (40, 90, 2)
Dtypes = list[torch.dtype]


def model(chunks: DualChunkConfig | None) -> Qwen3:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
    return Qwen3(ModelConfig(**sizes, initializer_range=0.1, dual_chunk=chunks))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Dtypes, Dtypes]]:
    """Every operation that ran: its name, the types of the floats that its implementation got, and of those it gave."""
    calls = []
    choose = dispatch.choose

    def floats(values: tuple) -> Dtypes:
        return [x.dtype for x in values if isinstance(x, Tensor) and x.is_floating_point()]

    def recording(op: str, *arguments, **facts):
        function = choose(op, *arguments, **facts)

        def recorded(*inputs):
            outputs = function(*inputs)
            calls.append((op, floats(inputs), floats(outputs if isinstance(outputs, tuple) else (outputs,))))
            return outputs

        return recorded

    monkeypatch.setattr(dispatch, "choose", recording)
    return calls


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("chunks", [None, DualChunkConfig(24, 8)])
def test_products_are_in_bfloat16_and_routing_is_not(device, chunks, seen) -> None:
    qwen = model(chunks).to(device)
    routers = [module for module in qwen.modules() if isinstance(module, Router)]
    inputs, chosen = [], []

    def record(module, arguments, routing) -> None:
        inputs.append(arguments[0])
        chosen.append(routing.expert_ids_TK)

    for router in routers:
        router.register_forward_hook(record)
    ids_T = torch.randint(97, (sum(LENGTHS),), device=device)
    position_T = torch.cat([torch.arange(n) for n in LENGTHS]).to(device)
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    with torch.autocast(device, torch.bfloat16):
        hidden_TD = qwen(ids_T, position_T, bounds, max(LENGTHS)).hidden_TD
        loss = linear_cross_entropy(hidden_TD, qwen.lm_head_weight, ids_T.roll(-1)).loss
    loss.backward()

    half, single = torch.bfloat16, torch.float32
    frequencies = [] if chunks is None else [single]
    block = [
        ("qk_norm_rope", [half, half, single, single, single], [half, half]),
        ("dual_chunk_attention", [half, half, half, *frequencies], [half]),
        ("router_topk", [single], [single, single, single]),
        ("grouped_experts", [half, half, half, single], [half]),
    ]
    assert seen == [*block, *block, ("linear_cross_entropy", [half, single], [single, single])]
    assert hidden_TD.dtype == single
    assert all(p.grad is not None and p.grad.dtype == single for p in qwen.parameters())
    at_stake = False
    for router, x_TD, expert_ids_TK in zip(routers, inputs, chosen, strict=True):
        logits_TE = F.linear(x_TD.float(), router.weight)
        assert torch.equal(expert_ids_TK.long(), logits_TE.topk(4).indices)
        rounded_TE = F.linear(x_TD.bfloat16(), router.weight.bfloat16())
        at_stake |= not torch.equal(expert_ids_TK.long(), rounded_TE.topk(4).indices)
    assert at_stake
