"""Routing on Triton against the reference: interpreter numerics here, real shapes on a GPU."""

import contextlib

import pytest
import torch
from qwen3_kernels import Routing, dispatch, router_topk

pytest.importorskip("triton")
from qwen3_kernels import router_topk_triton as fast  # noqa: E402
from qwen3_kernels.launch import Launch  # noqa: E402

INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter was not chosen at import")
EXACT = ("expert_ids_TK", "counts_E", "order_N", "position_TK", "offsets_E")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Four tiles a group, of which programs place two, and two segments of two groups at once, in the interpreter."""
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(fast, "TILES", 4)
    monkeypatch.setattr(fast, "SEGMENTS", 2)
    for bucket in list(fast.PLACE_LAUNCHES):
        monkeypatch.setitem(fast.SCAN_LAUNCHES, bucket, Launch({"GROUPS": 2}, num_warps=1, num_stages=1))
        monkeypatch.setitem(fast.PLACE_LAUNCHES, bucket, Launch({"PLACED": 2}, num_warps=1, num_stages=1))


@contextlib.contextmanager
def implementation(name):
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(dispatch.interpreted())
        stack.enter_context(dispatch.prefer("router_topk", name))
        yield


def logits_with_ties(tokens, experts, device="cpu"):
    """Eighths: equal logits are common, and different ones differ by far more than rounding."""
    return (torch.randn(tokens, experts, device=device) * 16).round() / 8


def arguments(logits_TE, top_k, *, mask=False, replay=False, bias=False):
    tokens, experts = logits_TE.shape
    device = logits_TE.device
    token_mask_T = torch.rand(tokens, device=device) < 0.7 if mask else None
    given_TK = torch.rand(tokens, experts, device=device).topk(top_k).indices.to(torch.int16) if replay else None
    bias_E = torch.randint(-3, 4, (experts,), device=device) / 8 if bias else None
    return {"token_mask_T": token_mask_T, "expert_ids_TK": given_TK, "selection_bias_E": bias_E}


def upstream_of(logits_TE, top_k):
    device = logits_TE.device
    tokens, experts = logits_TE.shape
    return tuple(torch.randn(shape, device=device) for shape in ((tokens, top_k), (experts,), ()))


def differentiable(routing):
    return routing.weights_TK, routing.prob_sum_E, routing.z_sum


def both_ways(name, logits_TE, top_k, upstream, **options):
    leaf = logits_TE.clone().requires_grad_()
    with implementation(name):
        routing = router_topk(leaf, top_k, **options)
        (grad,) = torch.autograd.grad(differentiable(routing), leaf, upstream)
    return routing, grad


def assert_same(ours, expected, rtol=2e-5, atol=1e-6):
    for name, result, truth in zip(Routing._fields, ours[0], expected[0], strict=True):
        assert result.dtype == truth.dtype and result.shape == truth.shape, name
        if name in EXACT:
            assert torch.equal(result, truth), name
        else:
            torch.testing.assert_close(result, truth, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-4, atol=1e-5)


def assert_equals_reference(logits_TE, top_k, **options):
    upstream = upstream_of(logits_TE, top_k)
    ours = both_ways("triton", logits_TE, top_k, upstream, **options)
    assert_same(ours, both_ways("reference", logits_TE, top_k, upstream, **options))
    return ours


@cpu_only
@pytest.mark.parametrize("draw", [torch.randn, logits_with_ties])
@pytest.mark.parametrize(
    "tokens, experts, top_k", [(0, 8, 2), (1, 1, 1), (33, 128, 8), (70, 5, 5), (9, 512, 16), (19, 130, 3)]
)
@pytest.mark.usefixtures("poisoned_empty")
def test_fields_and_gradients_equal_the_reference(tokens, experts, top_k, draw):
    assert_equals_reference(draw(tokens, experts), top_k)


@cpu_only
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("features", [("mask",), ("replay",), ("bias",), ("mask", "replay"), ("mask", "bias")])
@pytest.mark.usefixtures("poisoned_empty")
def test_features_equal_the_reference(features, renormalize):
    logits_TE = torch.randn(41, 60) if "replay" in features else logits_with_ties(41, 60)
    assert_equals_reference(
        logits_TE, 6, renormalize=renormalize, **arguments(logits_TE, 6, **dict.fromkeys(features, True))
    )


@cpu_only
def test_scores_that_differ_in_the_last_bit_keep_their_order():
    """Scores are rounded, and among equal ones the lower id would win: in the choice, at its end."""
    logits_TE = torch.full((40, 128), -3.0)
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    logits_TE[:, [3, 90]] = torch.tensor([below_one, 1.0])
    logits_TE[:, [7, 110]] = torch.nextafter(torch.tensor(0.5), torch.tensor([0.0, 1.0]))
    with implementation("triton"):
        routing = router_topk(logits_TE, 3)
    assert routing.expert_ids_TK.tolist() == [[90, 3, 110]] * 40


@cpu_only
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_garbage_in_masked_tokens_reaches_nothing(name):
    logits_TE, mask_T = torch.randn(40, 16), torch.rand(40) < 0.5
    upstream = upstream_of(logits_TE, 2)
    clean, clean_grad = both_ways(name, logits_TE, 2, upstream, token_mask_T=mask_T)
    logits_TE[~mask_T] = float("nan")
    routing, grad = both_ways(name, logits_TE, 2, upstream, token_mask_T=mask_T)
    for field in set(Routing._fields) - {"expert_ids_TK"}:
        assert torch.equal(getattr(routing, field), getattr(clean, field)), field
    assert torch.equal(grad, clean_grad)
    assert routing.expert_ids_TK.min() >= 0 and routing.expert_ids_TK.max() < 16


@cpu_only
@pytest.mark.parametrize("garbage", [float("nan"), -float("nan"), float("-inf")])
def test_garbage_that_counts_leaves_a_permutation(garbage):
    """What is computed from it is lost, but its rows have places of their own: nothing is read outside of memory."""
    logits_TE = torch.randn(40, 16)
    logits_TE[3], logits_TE[5, 2:14], logits_TE[20, 7] = garbage, garbage, garbage
    with implementation("triton"):
        routing = router_topk(logits_TE, 4)
    assert all(len(set(ids)) == 4 for ids in routing.expert_ids_TK.tolist())
    assert sorted(routing.order_N.tolist()) == list(range(160))
    assert torch.equal(routing.order_N[routing.position_TK.flatten().long()], torch.arange(160, dtype=torch.int32))


@cpu_only
def test_a_replayed_expert_may_repeat_or_have_become_impossible():
    logits_TE = torch.randn(5, 8)
    given_TK = torch.tensor([[1, 1], [0, 3], [2, 2], [4, 5], [0, 0]], dtype=torch.uint8)
    assert_equals_reference(logits_TE, 2, expert_ids_TK=given_TK)
    logits_TE[:, 6] = 500.0  # every other probability is 0 in float32
    for name in ("triton", "reference"):
        with implementation(name):
            weights_TK = router_topk(logits_TE, 2, expert_ids_TK=given_TK).weights_TK
        torch.testing.assert_close(weights_TK, logits_TE.gather(1, given_TK.long()).softmax(-1))


@cpu_only
@pytest.mark.parametrize("output", [0, 1, 2])
def test_a_gradient_of_one_output_alone(output):
    logits_TE = torch.randn(9, 12)
    grads = []
    for name in ("triton", "reference"):
        leaf = logits_TE.clone().requires_grad_()
        with implementation(name):
            differentiable(router_topk(leaf, 3))[output].square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@cpu_only
@pytest.mark.parametrize("replay", [False, True])
def test_more_groups_than_are_scanned_at_once(replay):
    """Seven groups: two segments, of two rounds each."""
    logits_TE = logits_with_ties(203, 20)
    assert_equals_reference(logits_TE, 2, **arguments(logits_TE, 2, mask=True, replay=replay))


@cpu_only
def test_the_launches_that_ship(monkeypatch):
    monkeypatch.undo()
    logits_TE = logits_with_ties(67, 128)
    assert_equals_reference(logits_TE, 8, **arguments(logits_TE, 8, mask=True))


@cpu_only
def test_peaked_scores_keep_their_order():
    """Most probabilities of a token are 0 here."""
    assert_equals_reference(torch.linspace(-300.0, 300.0, 100).repeat(9, 1)[:, torch.randperm(100)], 8)


@cpu_only
def test_bfloat16_and_strided_logits():
    logits_TE = torch.randn(10, 24).to(torch.bfloat16)[:, ::2]
    with implementation("triton"):
        ours = router_topk(logits_TE, 2)
    assert_same((ours, torch.empty(0)), (router_topk(logits_TE, 2), torch.empty(0)))


@cpu_only
def test_the_operators_are_registered_right():
    logits_TE = torch.randn(9, 12, requires_grad=True)
    mask_T = torch.rand(9) < 0.7
    torch.library.opcheck(torch.ops.qwen3_kernels.router_topk, (logits_TE, 3, True, mask_T, None, None))


@pytest.mark.parametrize(
    "experts, top_k, limit", [(32, 17, "at most 16 experts a token, not 17"), (513, 1, "at most 512 experts, not 513")]
)
def test_beyond_the_limits_the_reference_runs(experts, top_k, limit):
    logits_TE = logits_with_ties(5, experts, "cuda" if torch.cuda.is_available() else "cpu")
    with implementation("triton"), pytest.raises(ValueError, match=limit):
        router_topk(logits_TE, top_k)
    with implementation("reference"):
        expected = router_topk(logits_TE, top_k)
    with contextlib.nullcontext() if torch.cuda.is_available() else dispatch.interpreted():
        assert all(torch.equal(a, b) for a, b in zip(router_topk(logits_TE, top_k), expected, strict=True))


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 31, 4096, 32768, 131072])
@pytest.mark.parametrize("experts, top_k", [(128, 8), (60, 4), (512, 16), (8, 1), (257, 10)])
def test_real_shapes_equal_the_reference(tokens, experts, top_k):
    logits_TE = logits_with_ties(tokens, experts, "cuda")
    upstream = upstream_of(logits_TE, top_k)
    ours = both_ways("triton", logits_TE, top_k, upstream)
    assert_same(ours, both_ways("reference", logits_TE, top_k, upstream), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("experts, top_k", [(128, 8), (512, 16), (256, 4)])
def test_close_scores_keep_their_order(experts, top_k):
    """A million tokens, most of which have logits that differ in the last bits only."""
    for _ in range(8):
        base_TE = torch.randn(131072, experts // 2, device="cuda").repeat(1, 2)
        steps_TE = torch.randint(0, 4, base_TE.shape, device="cuda", dtype=torch.int32)
        logits_TE = (base_TE.view(torch.int32) + steps_TE).view(torch.float32)
        with implementation("triton"):
            ids_TK = router_topk(logits_TE, top_k).expert_ids_TK
        with implementation("reference"):
            assert torch.equal(ids_TK, router_topk(logits_TE, top_k).expert_ids_TK)


@pytest.mark.gpu
@pytest.mark.parametrize("features", [("mask",), ("replay",), ("bias",), ("mask", "replay"), ("mask", "bias")])
@pytest.mark.parametrize("renormalize", [True, False])
def test_features_at_real_shapes(features, renormalize):
    logits_TE = logits_with_ties(5000, 128, "cuda")
    options = arguments(logits_TE, 8, **dict.fromkeys(features, True))
    if "bias" in features:
        # Sums of a rounded probability and a bias tie or not by the last bit: only the choice's quality is defined.
        with implementation("triton"):
            ours = router_topk(logits_TE, 8, renormalize=renormalize, **options)
        scores_TE = logits_TE.softmax(-1) + options["selection_bias_E"]
        chosen_TK = scores_TE.gather(1, ours.expert_ids_TK.long())
        torch.testing.assert_close(chosen_TK, scores_TE.topk(8).values, rtol=1e-5, atol=1e-6)
        return
    upstream = upstream_of(logits_TE, 8)
    ours = both_ways("triton", logits_TE, 8, upstream, renormalize=renormalize, **options)
    expected = both_ways("reference", logits_TE, 8, upstream, renormalize=renormalize, **options)
    assert_same(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("tokens, experts, top_k", [(5000, 128, 8), (33, 128, 8), (5000, 60, 4), (4999, 257, 10)])
def test_replay_of_every_integer_type_counts_right(tokens, experts, top_k, dtype, mask):
    """Given ids and the mask of their rows come to the counts in different layouts, partly filled tiles included."""
    if dtype is torch.uint8 and experts > 256:
        pytest.skip("ids do not fit")
    logits_TE = torch.randn(tokens, experts, device="cuda")
    options = arguments(logits_TE, top_k, mask=mask, replay=True)
    options["expert_ids_TK"] = options["expert_ids_TK"].to(dtype)
    upstream = upstream_of(logits_TE, top_k)
    ours = both_ways("triton", logits_TE, top_k, upstream, **options)
    counted_TK = options["expert_ids_TK"] if not mask else options["expert_ids_TK"][options["token_mask_T"]]
    assert torch.equal(ours[0].counts_E, counted_TK.long().flatten().bincount(minlength=experts))
    assert_same(ours, both_ways("reference", logits_TE, top_k, upstream, **options), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_every_row_on_one_expert():
    """As many rows of one expert as a span can hold: replayed ids may repeat in a token."""
    logits_TE = torch.randn(131072, 128, device="cuda")
    given_TK = torch.full((131072, 8), 5, device="cuda")
    upstream = upstream_of(logits_TE, 8)
    ours = both_ways("triton", logits_TE, 8, upstream, expert_ids_TK=given_TK)
    expected = both_ways("reference", logits_TE, 8, upstream, expert_ids_TK=given_TK)
    assert_same(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_every_run_gives_the_same_bits():
    logits_TE = torch.randn(32768, 128, device="cuda")
    upstream = upstream_of(logits_TE, 8)
    first, first_grad = both_ways("triton", logits_TE, 8, upstream)
    for _ in range(20):
        routing, grad = both_ways("triton", logits_TE, 8, upstream)
        assert all(torch.equal(a, b) for a, b in zip(routing, first, strict=True))
        assert torch.equal(grad, first_grad)


@pytest.mark.gpu
def test_compiles_as_one_graph():
    logits_TE = torch.randn(3000, 128, device="cuda")
    upstream = upstream_of(logits_TE, 8)
    expected = both_ways("triton", logits_TE, 8, upstream)

    def run(leaf):
        return router_topk(leaf, 8)

    leaf = logits_TE.clone().requires_grad_()
    routing = torch.compile(run, fullgraph=True)(leaf)
    (grad,) = torch.autograd.grad(differentiable(routing), leaf, upstream)
    assert all(torch.equal(a, b) for a, b in zip(routing, expected[0], strict=True))
    assert torch.equal(grad, expected[1])


@pytest.mark.gpu
def test_a_cuda_graph_replays_it():
    logits_TE = torch.randn(4096, 128, device="cuda")
    router_topk(logits_TE, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = router_topk(logits_TE, 8)
    logits_TE.copy_(torch.randn_like(logits_TE))
    graph.replay()
    for replayed, expected in zip(routing, router_topk(logits_TE, 8), strict=True):
        assert torch.equal(replayed, expected)


@pytest.mark.gpu
def test_it_runs_by_default_and_waits_for_nothing():
    assert dispatch.choose("router_topk", torch.zeros(1, 8, device="cuda"), top_k=8) is fast.run
    logits_TE = torch.randn(4096, 128, device="cuda", requires_grad=True)
    weight = torch.ones((), device="cuda")
    router_topk(logits_TE, 8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        routing = router_topk(logits_TE, 8)
        torch.autograd.backward(differentiable(routing)[2], weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
