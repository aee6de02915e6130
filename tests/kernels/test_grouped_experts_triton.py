"""The GPU experts against ``reference``: in the interpreter (float32, small) and on a GPU (bfloat16, real shapes)."""

import pytest
import torch
import torch.nn.functional as F
from qwen3_kernels import Routing, dispatch, grouped_experts, router_topk
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

if not dispatch.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from qwen3_kernels import grouped_experts_products_triton as launches
from qwen3_kernels import grouped_experts_triton as experts_triton

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled")
PRODUCTS = experts_triton.PRODUCTS
Problem = tuple[Tensor, Tensor, Tensor, Routing]


def routing_of(logits_TE: Tensor, top_k: int, mask_T: Tensor | None = None) -> Routing:
    routing = router_topk(logits_TE, top_k, token_mask_T=mask_T)
    return routing._replace(weights_TK=routing.weights_TK.detach().requires_grad_())


def problem(tokens, experts, top_k, width, hidden, *, logits=None, mask=None, device="cpu", dtype=torch.float32):
    torch.manual_seed(tokens)
    x = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    w_gate_up = (torch.randn(experts, 2 * hidden, width, device=device) * width**-0.5).to(dtype).requires_grad_()
    w_down = (torch.randn(experts, width, hidden, device=device) * hidden**-0.5).to(dtype).requires_grad_()
    logits = torch.randn(tokens, experts, device=device) if logits is None else logits
    return x, w_gate_up, w_down, routing_of(logits, top_k, mask)


def results(name: str, inputs: Problem, upstream: Tensor) -> list[Tensor]:
    """Output and the gradients of x, both weights and the routing weights."""
    leaves = [*inputs[:3], inputs[3].weights_TK]
    with dispatch.prefer("grouped_experts", name):
        out = grouped_experts(*inputs)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


CASES = {
    "odd sizes": dict(tokens=37, experts=6, top_k=2, width=40, hidden=24),
    "whole blocks, by descriptors": dict(tokens=50, experts=4, top_k=2, width=64, hidden=64),
    "one token": dict(tokens=1, experts=8, top_k=4, width=32, hidden=32),
    "no token": dict(tokens=0, experts=3, top_k=2, width=32, hidden=16),
    "one expert": dict(tokens=9, experts=1, top_k=1, width=16, hidden=8),
    "as many slots as experts": dict(tokens=7, experts=4, top_k=4, width=24, hidden=20),
    "top 3 of 5": dict(tokens=21, experts=5, top_k=3, width=20, hidden=36),
}


def special(name: str) -> Problem:
    logits = torch.randn(70, 8)
    if name == "all on one expert":
        logits[:, 5] += 100.0
        return problem(70, 8, 1, 32, 32, logits=logits)
    if name == "most experts empty":
        logits[:, 3:6] += 100.0
        return problem(70, 8, 2, 32, 32, logits=logits)
    mask = torch.ones(70, dtype=torch.bool) if name == "few masked" else torch.zeros(70, dtype=torch.bool)
    mask[::3] = False
    return problem(70, 8, 2, 32, 32, logits=logits, mask=mask)


SPLIT = dispatch.Implementation(experts_triton.run_grouped_mm, dispatch.fits_anything)
SPECIAL = ("all on one expert", "most experts empty", "few masked", "all masked")


def fp32_grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """What torch's grouped_mm promises, and garbage wherever it promises nothing."""
    bounds = [0, *offs.tolist()]
    spans = [slice(start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    if b.dim() == 2:
        return torch.stack([a[:, s] @ b[s] if s.start < s.stop else a.new_full((), torch.nan).expand(
            a.shape[0], b.shape[1]) for s in spans])  # fmt: skip
    out = a.new_full((a.shape[0], b.shape[2]), torch.nan)
    for e, s in enumerate(spans):
        out[s] = a[s] @ b[e]
    return out


def assert_same_results(inputs: Problem, name: str = "triton") -> None:
    upstream = torch.randn_like(inputs[0])
    expected = results("reference", inputs, upstream)
    with dispatch.interpreted():
        got = results(name, inputs, upstream)
    for label, ours, theirs in zip(("out", "x", "w_gate_up", "w_down", "weights"), got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5, msg=lambda text, label=label: f"{label}: {text}")


@interpreter
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_reference(case, poisoned_empty):
    assert_same_results(problem(**CASES[case]))


@interpreter
@pytest.mark.parametrize("name", SPECIAL)
def test_empty_experts_crowded_experts_and_masked_tokens(name, poisoned_empty):
    assert_same_results(special(name))


@interpreter
@pytest.mark.parametrize("products", [experts_triton.ALL, *PRODUCTS])
def test_any_product_may_run_by_grouped_mm(products, poisoned_empty, monkeypatch):
    monkeypatch.setattr(F, "grouped_mm", fp32_grouped_mm)
    monkeypatch.setattr(experts_triton, "ALL", products)
    monkeypatch.setitem(dispatch._registry["grouped_experts"], "this_split", SPLIT)
    assert_same_results(special("few masked" if products in PRODUCTS[:3] else "most experts empty"), "this_split")


@interpreter
@pytest.mark.parametrize("launch_bucket", [*launches.ROWS_PER_EXPERT, "plenty"])
@pytest.mark.parametrize("width, hidden", [(72, 40), (128, 128)], ids=["ragged widths", "whole blocks"])
def test_every_shipped_tile_gives_the_same(launch_bucket, width, hidden, monkeypatch):
    """Tiles of bfloat16 launches, in float32: at widths that do not divide, and at widths read by descriptors."""
    monkeypatch.setattr(launches, "launch_of", lambda product, *_: launches.LAUNCHES[90, launch_bucket, product])
    tokens = 30 if launch_bucket == "decode" else 50
    assert_same_results(problem(tokens, experts=2, top_k=1, width=width, hidden=hidden))


@interpreter
def test_last_row_blocks_of_half_height_and_of_full_height(monkeypatch):
    """Experts of 1, 16, 17, 32 and 33 rows with blocks of 32: half, half, full, full, full and half."""

    def launch_of(product: str, *_):
        launch = launches.LAUNCHES[90, "float32", product]
        return launch._replace(blocks={**launch.blocks, **({"HALF": 1} if "HALF" in launch.blocks else {})})

    monkeypatch.setattr(launches, "launch_of", launch_of)
    counts = [1, 16, 0, 17, 32, 33]
    logits = torch.zeros(sum(counts), len(counts))
    logits[torch.arange(sum(counts)), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))] = 50.0
    assert_same_results(problem(sum(counts), len(counts), 1, 32, 64, logits=logits[torch.randperm(sum(counts))]))


@interpreter
def test_output_without_gradients_keeps_nothing():
    inputs = problem(**CASES["odd sizes"])
    with dispatch.interpreted(), dispatch.prefer("grouped_experts", "triton"), torch.no_grad():
        out = grouped_experts(*inputs)
    assert not out.requires_grad
    torch.testing.assert_close(out, results("reference", inputs, torch.ones_like(out))[0], rtol=1e-5, atol=2e-5)


def partial_results(name: str, inputs: Problem, upstream: Tensor, wanted: tuple[bool, ...]) -> list[Tensor]:
    """Output and gradients where only the ``wanted`` of x, both weights and the routing weights require one."""
    leaves = [
        t.detach().requires_grad_(want) for t, want in zip((*inputs[:3], inputs[3].weights_TK), wanted, strict=True)
    ]
    with dispatch.prefer("grouped_experts", name):
        out = grouped_experts(*leaves[:3], inputs[3]._replace(weights_TK=leaves[3]))
    out.backward(upstream)
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


WANTED = {
    "x alone": (True, False, False, False),
    "gate and up alone": (False, True, False, False),
    "down alone": (False, False, True, False),
    "routing weights alone": (False, False, False, True),
    "frozen weights": (True, False, False, True),
    "all but x": (False, True, True, True),
}


@interpreter
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("products", ["", experts_triton.ALL], ids=["triton", "grouped_mm"])
def test_only_the_gradients_asked_for(wanted, products, poisoned_empty, monkeypatch):
    """No product is launched whose result nobody wants, neither ours nor torch's."""
    launched = []
    grad_weight, grad_x = launches.grad_weight, launches.grad_x
    monkeypatch.setattr(launches, "grad_weight", lambda *a, **k: launched.append("weight") or grad_weight(*a, **k))
    monkeypatch.setattr(launches, "grad_x", lambda *a: launched.append("x") or grad_x(*a))

    def grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        launched.append("weight" if b.dim() == 2 else "other")
        return fp32_grouped_mm(a, b, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    monkeypatch.setattr(experts_triton, "ALL", products)
    monkeypatch.setitem(dispatch._registry["grouped_experts"], "this_split", SPLIT)
    inputs = problem(9, 4, 2, 16, 16, mask=torch.arange(9) % 3 != 0)
    upstream = torch.randn_like(inputs[0])
    expected = partial_results("expert_loop", inputs, upstream, WANTED[wanted])
    with dispatch.interpreted():
        got = partial_results("this_split", inputs, upstream, WANTED[wanted])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    needs_x, needs_gate_up, needs_down, _ = WANTED[wanted]
    assert launched.count("weight") == needs_gate_up + needs_down
    assert launched.count("other") + launched.count("x") == (3 * bool(products) + needs_x)


@interpreter
@pytest.mark.parametrize("name", ["triton", "expert_loop"])
def test_inputs_and_gradients_need_not_be_contiguous(name):
    x, w_gate_up, w_down, routing = problem(**CASES["odd sizes"])
    upstream = torch.randn_like(x)
    expected = results("reference", (x, w_gate_up, w_down, routing), upstream)

    def strided(tensor: Tensor) -> Tensor:
        """The same numbers, the last two dimensions stored the other way round."""
        return tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_(tensor.requires_grad)

    assert not any(strided(t).is_contiguous() for t in (x, w_gate_up, w_down, upstream))
    inputs = (strided(x), strided(w_gate_up), strided(w_down), routing._replace(weights_TK=strided(routing.weights_TK)))
    with dispatch.interpreted():
        got = results(name, inputs, strided(upstream))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("width, expert_width, fits", [(64, 32, True), (60, 32, False), (64, 36, False)])
def test_grouped_mm_is_left_alone_with_rows_it_cannot_read(width, expert_width, fits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        x_TD = torch.empty(4, width, dtype=torch.bfloat16, device="cuda")
    chosen = dispatch.choose("grouped_experts", x_TD, expert_width=expert_width)
    assert chosen is (experts_triton.run_mixed if fits else experts_triton.run)
    if not fits:
        with pytest.raises(ValueError, match=f"x has {width} columns and an expert {expert_width}"):
            dispatch.choose("grouped_experts", x_TD, "grouped_mm", expert_width=expert_width)


@interpreter
def test_operator_definition():
    x, w_gate_up, w_down, routing = problem(**CASES["odd sizes"])
    tensors = (x, w_gate_up, w_down, routing.weights_TK, routing.order_N, routing.position_TK, routing.offsets_E)
    torch.library.opcheck(experts_triton._forward, (*tensors, "", True))


@interpreter
@pytest.mark.parametrize("needs", [(True, False, True), (False, True, False)])
def test_operator_definition_of_the_backward_pass(needs):
    x, w_gate_up, w_down, routing = problem(3, 4, 2, 16, 16)
    tensors = (x, w_gate_up, w_down, routing.weights_TK, routing.order_N, routing.position_TK, routing.offsets_E)
    out, gate_up = experts_triton._forward(*tensors, "", True)
    plain = (torch.randn_like(out), *(t.detach() for t in (*tensors, gate_up)))
    torch.library.opcheck(experts_triton._backward, (*plain, "", *needs))


def test_row_blocks_bound_holds_for_the_worst_routing():
    launch = launches.LAUNCHES[90, "decode", "gate_up"]
    size = launch.blocks["BLOCK_M"]
    for rows, experts in ((1, 128), (8, 128), (200, 128), (2048, 128), (64, 3)):
        most = launches._row_blocks(rows, experts, launch)
        filled = min(rows, experts)
        counts = torch.ones(filled, dtype=torch.long)  # every expert one row, the rest in one: most blocks are ragged
        counts[0] += rows - filled
        assert int(((counts + size - 1) // size).sum()) <= most


def test_mixed_types_are_refused():
    x, w_gate_up, w_down, routing = problem(**CASES["odd sizes"])
    with pytest.raises(ValueError, match="cast them to one type"):
        experts_triton._run("", (x, w_gate_up.half(), w_down, routing.weights_TK))


# On a GPU, at Qwen3-30B-A3B's widths.

GPU = pytest.mark.gpu
WIDTHS = dict(experts=128, top_k=8, width=2048, hidden=768, device="cuda", dtype=torch.bfloat16)
NAMES = ("mixed", "triton", "grouped_mm")


def relative_errors(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, truth, strict=True)]


def assert_as_good_as_eager(inputs: Problem, name: str) -> None:
    """Against the float32 loop: no output or gradient is off by more than 1.5 times what the bfloat16 loop is."""
    upstream = torch.randn_like(inputs[0])
    exact = tuple(t.detach().float().requires_grad_() for t in inputs[:3])
    truth = results("expert_loop", (*exact, inputs[3]), upstream.float())
    eager = relative_errors(results("expert_loop", inputs, upstream), truth)
    ours = relative_errors(results(name, inputs, upstream), truth)
    for label, error, allowed in zip(("out", "x", "w_gate_up", "w_down", "weights"), ours, eager, strict=True):
        assert error <= 1.5 * allowed + 1e-4, f"{label}: {error:.2e}, the bfloat16 loop is off by {allowed:.2e}"


@GPU
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 8, 100, 256, 1000, 4096])
def test_bfloat16_is_as_good_as_eager(name, tokens):
    assert_as_good_as_eager(problem(tokens, **WIDTHS), name)


@GPU
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("crowd", ["one expert for all", "few experts", "masked"])
def test_bfloat16_with_skewed_and_masked_routing(name, crowd, poisoned_empty):
    logits, mask = torch.randn(700, 128, device="cuda"), None
    if crowd == "masked":
        mask = torch.rand(700, device="cuda") < 0.8
    else:
        logits[:, : 8 if crowd == "one expert for all" else 16] += 100.0
    assert_as_good_as_eager(problem(700, **WIDTHS, logits=logits, mask=mask), name)


@GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types(dtype):
    inputs = problem(300, **{**WIDTHS, "experts": 16, "dtype": dtype})
    upstream = torch.randn_like(inputs[0])
    exact = tuple(t.detach().double().requires_grad_() for t in inputs[:3])
    truth = results("expert_loop", (*exact, inputs[3]), upstream.double())
    ours = relative_errors(results("triton", inputs, upstream), truth)
    assert max(ours) < (2e-3 if dtype == torch.float16 else 2e-6), ours


@GPU
@pytest.mark.parametrize("name", NAMES)
def test_twenty_runs_are_bit_identical(name):
    inputs = problem(2048, **WIDTHS)
    upstream = torch.randn_like(inputs[0])
    first = results(name, inputs, upstream)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, results(name, inputs, upstream), strict=True))


@GPU
@pytest.mark.parametrize("name", NAMES)
def test_offsets_beyond_32_bits(name):
    """131,072 tokens are 2^31 elements of sorted rows; every token repeats one of 1,024, so must its results."""
    tokens, distinct = 131_072, 1024
    few = problem(distinct, **WIDTHS)
    repeat = torch.arange(tokens, device="cuda") % distinct
    logits = torch.randn(distinct, 128, device="cuda")
    upstream = torch.randn_like(few[0])
    few = (*few[:3], routing_of(logits, 8))
    many = (few[0].detach()[repeat].requires_grad_(), *few[1:3], routing_of(logits[repeat], 8))
    expected, got = results(name, few, upstream), results(name, many, upstream[repeat])
    copies = tokens // distinct
    scales = (1, 1, copies, copies, 1)  # the weights' gradients sum over the copies
    rows = [got[0][-distinct:], got[1][-distinct:], got[2], got[3], got[4][-distinct:]]
    for ours, theirs, scale in zip(rows, expected, scales, strict=True):
        error = (ours.float() - theirs.float() * scale).norm() / (theirs.float() * scale).norm()
        assert error < 6e-3, error


@GPU
@pytest.mark.parametrize("name", NAMES)
def test_compiled_as_one_graph(name):
    inputs = problem(512, **WIDTHS)
    upstream = torch.randn_like(inputs[0])
    leaves = [*inputs[:3], inputs[3].weights_TK]
    with dispatch.prefer("grouped_experts", name):
        out = torch.compile(grouped_experts, fullgraph=True)(*inputs)
        grads = torch.autograd.grad(out, leaves, upstream)
    for ours, theirs in zip((out, *grads), results(name, inputs, upstream), strict=True):
        assert torch.equal(ours, theirs)


@GPU
@pytest.mark.parametrize("tokens", [1, 64, 256])
def test_one_cuda_graph_replays_with_any_routing(tokens):
    x, w_gate_up, w_down, routing = (t.detach() if isinstance(t, Tensor) else t for t in problem(tokens, **WIDTHS))
    routing = Routing(*(t.detach().clone() for t in routing))
    with torch.no_grad():
        grouped_experts(x, w_gate_up, w_down, routing)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = grouped_experts(x, w_gate_up, w_down, routing)
        for seed in range(3):
            torch.manual_seed(seed)
            logits = torch.randn(tokens, 128, device="cuda")
            logits[:, 5] += 100.0 * (seed == 2)
            for kept, new in zip(routing, router_topk(logits, 8), strict=True):
                kept.copy_(new)
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(out, grouped_experts(x, w_gate_up, w_down, routing))


@GPU
def test_operator_definitions_on_a_gpu():
    x, w_gate_up, w_down, routing = problem(64, **{**WIDTHS, "experts": 16})
    tensors = (x, w_gate_up, w_down, routing.weights_TK, routing.order_N, routing.position_TK, routing.offsets_E)
    torch.library.opcheck(experts_triton._forward, (*tensors, "mixed", True))
    out, gate_up = experts_triton._forward(*tensors, "mixed", True)
    plain = tuple(t.detach() for t in tensors)
    for needs in ((True, True, True), (True, False, False), (False, True, True)):
        arguments = (torch.randn_like(out), *plain, gate_up.detach(), "mixed", *needs)
        torch.library.opcheck(experts_triton._backward, arguments)


@GPU
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("name", NAMES)
def test_partial_gradients_are_those_of_all(name, wanted):
    inputs = problem(2048, **WIDTHS)
    upstream = torch.randn_like(inputs[0])
    out, *grads = results(name, inputs, upstream)
    expected = [out, *(grad for grad, want in zip(grads, WANTED[wanted], strict=True) if want)]
    got = partial_results(name, inputs, upstream, WANTED[wanted])
    for ours, theirs in zip(got, expected, strict=True):  # sums of partial dots may take another order
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@GPU
@pytest.mark.parametrize("name", NAMES)
def test_gradients_from_outside_need_not_be_contiguous(name):
    inputs = problem(300, **WIDTHS)
    upstream = torch.randn_like(inputs[0])
    expected = results(name, inputs, upstream)
    strided = inputs[0].detach().t().contiguous().t().requires_grad_()
    got = results(name, (strided, *inputs[1:]), upstream.t().contiguous().t())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@GPU
@pytest.mark.parametrize("hidden", [36, 33])
def test_expert_widths_that_grouped_mm_refuses(hidden):
    inputs = problem(500, **{**WIDTHS, "experts": 16, "hidden": hidden})
    assert dispatch.choose("grouped_experts", inputs[0], expert_width=hidden) is experts_triton.run
    assert_as_good_as_eager(inputs, "triton")


@GPU
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_with_float32_weights(x_dtype, compiled):
    """As inputs cast by hand, by whatever runs for bfloat16, and with gradients in the parameters' types."""
    x, w_gate_up, w_down, routing = problem(1000, **{**WIDTHS, "dtype": torch.float32})
    leaves = [x.detach().to(x_dtype).requires_grad_(), w_gate_up, w_down, routing.weights_TK]
    upstream = torch.randn_like(x).bfloat16()
    cast = tuple(t.detach().bfloat16().requires_grad_() for t in (x, w_gate_up, w_down))
    expected = grouped_experts(*cast, routing)
    expected = [expected, *torch.autograd.grad(expected, (*cast, routing.weights_TK), upstream)]
    function = torch.compile(grouped_experts, fullgraph=True) if compiled else grouped_experts
    with torch.autocast("cuda", torch.bfloat16):
        out = function(*leaves[:3], routing)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, leaves, upstream)
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
    assert all(torch.equal(a.float(), b.float()) for a, b in zip((out, *grads), expected, strict=True))
