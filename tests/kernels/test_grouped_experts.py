"""The experts against a loop over tokens and slots, outputs and gradients, in float64."""

import pytest
import torch
import torch.nn.functional as F
from qwen3_kernels import dispatch, grouped_experts, router_topk


def slow_experts(x_TD, w_gate_up_E2FD, w_down_EDF, routing):
    out = []
    for t in range(x_TD.shape[0]):
        total = torch.zeros_like(x_TD[t])
        for k in range(routing.expert_ids_TK.shape[1]):
            e = routing.expert_ids_TK[t, k]
            gate, up = (w_gate_up_E2FD[e] @ x_TD[t]).chunk(2)
            total = total + routing.weights_TK[t, k] * (w_down_EDF[e] @ (F.silu(gate) * up))
        out.append(total)
    return torch.stack(out)


def problem(tokens, experts, top_k, *, one_hot=False, mask=None):
    torch.manual_seed(tokens)
    width, hidden = 12, 7
    x = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    w_gate_up = torch.randn(experts, 2 * hidden, width, dtype=torch.float64, requires_grad=True)
    w_down = torch.randn(experts, width, hidden, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(tokens, experts)
    if one_hot:
        logits[:, 2] += 100.0
    routing = router_topk(logits, top_k, token_mask_T=mask)
    weights = routing.weights_TK.detach().double().requires_grad_()
    return x, w_gate_up, w_down, routing._replace(weights_TK=weights)


@pytest.mark.parametrize("implementation", ["expert_loop", "reference"])
@pytest.mark.parametrize(
    "tokens, experts, top_k, one_hot", [(19, 8, 2, False), (1, 16, 4, False), (9, 4, 1, True), (5, 1, 1, False)]
)
def test_outputs_and_gradients_equal_slow_version(implementation, tokens, experts, top_k, one_hot):
    inputs = problem(tokens, experts, top_k, one_hot=one_hot)
    parameters = (*inputs[:3], inputs[3].weights_TK)
    with dispatch.prefer("grouped_experts", implementation):
        out = grouped_experts(*inputs)
    expected = slow_experts(*inputs)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(out, parameters, upstream), torch.autograd.grad(expected, parameters, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    x, w_gate_up, w_down, routing = problem(6, 5, 2)

    def function(x, w_gate_up, w_down, weights):
        return grouped_experts(x, w_gate_up, w_down, routing._replace(weights_TK=weights))

    assert torch.autograd.gradcheck(function, (x, w_gate_up, w_down, routing.weights_TK))


def test_masked_tokens_get_zero_and_change_nothing():
    mask = torch.tensor([True, True, True, False])
    x, w_gate_up, w_down, routing = problem(4, 8, 2, mask=mask)
    out = grouped_experts(x, w_gate_up, w_down, routing)
    assert torch.equal(out[3], torch.zeros_like(out[3]))
    torch.testing.assert_close(out[:3], slow_experts(x, w_gate_up, w_down, routing)[:3])
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad[3].abs().max() == 0


@pytest.mark.parametrize("implementation", ["expert_loop", "reference"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_inputs_and_not_gradients(implementation, x_dtype):
    """Every result is that of inputs cast by hand, the gradients in the parameters' types; backward inside or not."""
    x, w_gate_up, w_down, routing = problem(19, 8, 2)
    x, w_gate_up, w_down = (t.detach().float() for t in (x, w_gate_up, w_down))
    routing = routing._replace(weights_TK=routing.weights_TK.detach().float().requires_grad_())
    upstream = torch.randn_like(x).bfloat16()

    def results(dtypes, autocast, backward_inside):
        leaves = [t.to(dtype).requires_grad_() for t, dtype in zip((x, w_gate_up, w_down), dtypes, strict=True)]
        with dispatch.prefer("grouped_experts", implementation), torch.autocast("cpu", enabled=autocast):
            out = grouped_experts(*leaves, routing)
            with torch.autocast("cpu", enabled=backward_inside):
                grads = torch.autograd.grad(out, (*leaves, routing.weights_TK), upstream)
        return [out, *grads]

    expected = results([torch.bfloat16] * 3, False, False)
    for backward_inside in (False, True):
        got = results([x_dtype, torch.float32, torch.float32], True, backward_inside)
        assert [t.dtype for t in got] == [torch.bfloat16, x_dtype, torch.float32, torch.float32, torch.float32]
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, expected, strict=True))


def test_unwritten_memory_is_never_read(poisoned_empty):
    inputs = problem(11, 6, 2)
    out = grouped_experts(*inputs)
    grads = torch.autograd.grad(out.sum(), inputs[:3])
    assert all(torch.isfinite(t).all() for t in (out, *grads))
