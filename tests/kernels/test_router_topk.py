"""Routing against a token-by-token version in Python."""

import pytest
import torch
from qwen3_kernels import router_topk


def slow_routing(logits_TE, top_k, renormalize):
    ids, weights = [], []
    for row in logits_TE.double():
        probs = row.softmax(-1)
        order = sorted(range(len(row)), key=lambda e: (-probs[e].item(), e))[:top_k]
        chosen = probs[order]
        ids.append(order)
        weights.append(chosen / chosen.sum() if renormalize else chosen)
    return torch.tensor(ids, dtype=torch.int32), torch.stack(weights)


@pytest.mark.parametrize("num_experts, top_k", [(128, 8), (1, 1), (7, 3), (512, 16), (5, 5)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_routing_equals_slow_version(num_experts, top_k, renormalize):
    torch.manual_seed(num_experts)
    logits_TE = torch.randn(33, num_experts)
    routing = router_topk(logits_TE, top_k, renormalize=renormalize)
    ids_TK, weights_TK = slow_routing(logits_TE, top_k, renormalize)
    assert torch.equal(routing.expert_ids_TK, ids_TK)
    torch.testing.assert_close(routing.weights_TK.double(), weights_TK, rtol=1e-5, atol=1e-7)
    assert torch.equal(routing.counts_E, torch.bincount(ids_TK.flatten(), minlength=num_experts))
    torch.testing.assert_close(routing.prob_sum_E, logits_TE.softmax(-1).sum(0))
    torch.testing.assert_close(routing.z_sum, (logits_TE.logsumexp(-1) ** 2).sum())


def test_ties_go_to_the_lower_id_and_order_is_stable():
    logits_TE = torch.zeros(6, 16)
    logits_TE[:, 9] = 1.0
    routing = router_topk(logits_TE, 3)
    assert routing.expert_ids_TK.tolist() == [[9, 0, 1]] * 6
    expert_N = routing.expert_ids_TK.flatten()[routing.order_N]
    assert expert_N.tolist() == [0] * 6 + [1] * 6 + [9] * 6
    for expert in (0, 1, 9):
        rows = routing.order_N[expert_N == expert]
        assert torch.equal(rows, rows.sort().values)


def test_position_inverts_order_and_offsets_end_the_groups():
    torch.manual_seed(0)
    mask_T = torch.rand(40) < 0.7
    routing = router_topk(torch.randn(40, 12), 3, token_mask_T=mask_T)
    assert routing.order_N.dtype == routing.position_TK.dtype == routing.offsets_E.dtype == torch.int32
    assert torch.equal(routing.order_N[routing.position_TK.flatten()], torch.arange(120, dtype=torch.int32))
    assert torch.equal(routing.offsets_E, routing.counts_E.cumsum(0).int())
    assert routing.offsets_E[-1] == 3 * mask_T.sum()
    expert_N = routing.expert_ids_TK.flatten()[routing.order_N]
    for expert, end in enumerate(routing.offsets_E.tolist()):
        assert (expert_N[end - routing.counts_E[expert] : end] == expert).all()


def test_masked_tokens_go_nowhere():
    torch.manual_seed(0)
    logits_TE = torch.randn(10, 8)
    mask_T = torch.tensor([True] * 7 + [False] * 3)
    masked, alone = router_topk(logits_TE, 2, token_mask_T=mask_T), router_topk(logits_TE[:7], 2)
    assert torch.equal(masked.counts_E, alone.counts_E)
    assert torch.equal(masked.order_N[:14], alone.order_N)
    assert masked.order_N[14:].tolist() == list(range(14, 20))
    torch.testing.assert_close(masked.prob_sum_E, alone.prob_sum_E)
    torch.testing.assert_close(masked.z_sum, alone.z_sum)
    assert masked.weights_TK[7:].abs().max() == 0


def test_replay_uses_the_given_experts_and_keeps_the_gradient():
    torch.manual_seed(0)
    logits_TE = torch.randn(5, 8, requires_grad=True)
    given_TK = torch.tensor([[7, 0]] * 5, dtype=torch.uint8)
    routing = router_topk(logits_TE, 2, expert_ids_TK=given_TK)
    assert torch.equal(routing.expert_ids_TK, given_TK.int())
    probs = logits_TE.detach().softmax(-1)[:, [7, 0]]
    torch.testing.assert_close(routing.weights_TK, probs / probs.sum(-1, keepdim=True))
    routing.weights_TK[:, 0].sum().backward()
    assert logits_TE.grad.abs().sum() > 0.1


def test_selection_bias_moves_the_choice_and_not_the_weights():
    logits_TE = torch.tensor([[2.0, 1.0, 0.0]])
    bias_E = torch.tensor([-10.0, 0.0, 0.0])
    routing = router_topk(logits_TE, 2, renormalize=False, selection_bias_E=bias_E)
    assert routing.expert_ids_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.weights_TK, logits_TE.softmax(-1)[:, 1:])


def test_top_k_out_of_range_is_refused():
    with pytest.raises(ValueError, match="top_k is 9, expected between 1 and the 8 experts"):
        router_topk(torch.zeros(2, 8), 9)
