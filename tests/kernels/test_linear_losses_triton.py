"""The GPU path of the head operations: numbers against the reference, chunks, memory, compilation, graphs."""

import contextlib
import math

import pytest
import torch
from qwen3_kernels import dispatch, head_products, linear_cross_entropy, linear_logprob

pytest.importorskip("triton")
from qwen3_kernels import linear_cross_entropy_triton, linear_logprob_triton  # noqa: E402

interpreter_only = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def only(op, implementation):
    with contextlib.ExitStack() as stack:
        if DEVICE == "cpu" and implementation == "triton":
            stack.enter_context(dispatch.interpreted())
        stack.enter_context(dispatch.prefer(op, implementation))
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks far below the vocabulary, so that a row has whole blocks and a rest."""
    tables = (
        (linear_cross_entropy_triton, "ROWS_LAUNCH"),
        (linear_logprob_triton, "SCORE_LAUNCH"),
        (linear_logprob_triton, "GRADIENT_LAUNCH"),
    )
    for module, table in tables:
        small = {g: v._replace(blocks={**v.blocks, "BLOCK": 128}) for g, v in getattr(module, table).items()}
        monkeypatch.setattr(module, table, small)


@pytest.fixture
def chunks_of_three(monkeypatch):
    for module in (linear_cross_entropy_triton, linear_logprob_triton):
        monkeypatch.setattr(module, "rows_per_chunk", lambda *_: 3)


def problem(tokens=7, width=8, vocab=301, dtype=torch.float32, device=DEVICE):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, targets.to(device)


def cross_entropy(implementation, hidden, weight, targets, scale=1.0, **options):
    with only("linear_cross_entropy", implementation):
        result = linear_cross_entropy(hidden, weight, targets, **options)
    return result, torch.autograd.grad(result.loss * scale, (hidden, weight))


def assert_same(ours, theirs, rtol=2e-5, atol=2e-6):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@interpreter_only
@pytest.mark.parametrize("vocab, valid", [(301, None), (301, 256), (256, 129), (90, 77), (512, None)])
@pytest.mark.parametrize("z_loss_weight, weighted", [(0.0, False), (0.1, True)])
def test_cross_entropy(small_blocks, poisoned_empty, vocab, valid, z_loss_weight, weighted):
    hidden, weight, targets = problem(vocab=vocab)
    targets = targets % (valid or vocab)
    targets[[2, 6]] = -100
    options = {"z_loss_weight": z_loss_weight, "valid_vocab": valid}
    options["loss_weights_T"] = torch.rand(7) if weighted else None
    ours, our_grads = cross_entropy("triton", hidden, weight, targets, 3.0, **options)
    theirs, their_grads = cross_entropy("reference", hidden, weight, targets, 3.0, **options)
    assert_same((*ours, *our_grads), (*theirs, *their_grads))
    assert not ours.nll_T.requires_grad
    assert our_grads[1][valid or vocab :].abs().sum() == 0


@interpreter_only
def test_cross_entropy_of_several_chunks(small_blocks, chunks_of_three, poisoned_empty):
    hidden, weight, targets = problem()
    ours, our_grads = cross_entropy("triton", hidden, weight, targets)
    theirs, their_grads = cross_entropy("reference", hidden, weight, targets)
    assert_same((*ours, *our_grads), (*theirs, *their_grads))


@interpreter_only
def test_cross_entropy_with_large_logits_and_targets_out_of_range():
    hidden, weight, targets = problem()
    ours, grads = cross_entropy("triton", hidden * 60, weight, targets)
    theirs, expected = cross_entropy("reference", hidden * 60, weight, targets)
    assert_same((*ours, *grads), (*theirs, *expected), rtol=1e-4, atol=1e-4)
    targets[1] = 301
    assert torch.isinf(cross_entropy("triton", hidden, weight, targets)[0].nll_T).tolist() == [0, 1, 0, 0, 0, 0, 0]


@interpreter_only
def test_cross_entropy_of_nothing(poisoned_empty):
    hidden, weight, targets = problem()
    ignored, grads = cross_entropy("triton", hidden, weight, torch.full_like(targets, -100))
    assert ignored.loss == 0 and all(g.abs().max() == 0 for g in grads)
    empty, grads = cross_entropy("triton", hidden[:0], weight, targets[:0])
    assert empty.loss == 0 and empty.nll_T.shape == (0,) and grads[1].abs().max() == 0


@interpreter_only
@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprob"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for(op, wanted):
    hidden, weight, targets = problem()
    hidden.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    with only(op, "triton"):
        if op == "linear_cross_entropy":
            loss = linear_cross_entropy(hidden, weight, targets).loss
        else:
            loss = linear_logprob(hidden, weight, targets).logprob_T.sum()
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    assert (hidden.grad is not None, weight.grad is not None) == wanted


@interpreter_only
@pytest.mark.parametrize("jsd_beta", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("vocab, valid", [(301, 256), (301, 280), (90, None)])
def test_logprob(small_blocks, poisoned_empty, jsd_beta, vocab, valid):
    hidden, weight, tokens = problem(vocab=vocab)
    options = {"temperature": 0.7, "valid_vocab": valid}
    if jsd_beta is not None:
        options["teacher_hidden_TD"] = torch.randn(7, 5)
        options["teacher_weight_VD"] = torch.randn(vocab if valid is None else vocab + 9, 5)
        options["jsd_beta"] = jsd_beta
    check_logprob(hidden, weight, tokens % (valid or vocab), options)


def check_logprob(hidden, weight, tokens, options, rtol=1e-4, atol=5e-6):
    results = {}
    for implementation in ("triton", "reference"):
        with only("linear_logprob", implementation):
            values = [x for x in linear_logprob(hidden, weight, tokens, **options) if x is not None]
        upstream = [torch.linspace(-1, 2, len(x), device=x.device) for x in values]
        grads = [
            g
            for x, of_x in zip(values, upstream, strict=True)  # each alone, then all at once
            for g in torch.autograd.grad(x, (hidden, weight), of_x, retain_graph=True)
        ]
        grads += torch.autograd.grad(values, (hidden, weight), upstream)
        results[implementation] = [*values, *grads]
    assert_same(results["triton"], results["reference"], rtol, atol)


@interpreter_only
def test_logprob_of_several_chunks(small_blocks, chunks_of_three, poisoned_empty):
    hidden, weight, tokens = problem()
    teacher = {"teacher_hidden_TD": torch.randn(7, 5), "teacher_weight_VD": torch.randn(301, 5), "jsd_beta": 0.5}
    check_logprob(hidden, weight, tokens, teacher)


@interpreter_only
@pytest.mark.parametrize("jsd_beta", [0.0, 0.3, 1.0])
def test_sharp_distributions_have_exact_small_values(jsd_beta):
    """Student and teacher almost certain of the token, 60 nats above the rest, and almost equal."""
    hidden = torch.eye(6) * 60
    weight = torch.eye(200, 6).requires_grad_()
    teacher = {"teacher_hidden_TD": hidden * 0.99, "teacher_weight_VD": weight.detach(), "jsd_beta": jsd_beta}
    with only("linear_logprob", "triton"):
        result = linear_logprob(hidden, weight, torch.arange(6), **teacher)
    for value in result:
        assert value.abs().max() < 1e-6
    gradient = torch.autograd.grad(result.divergence_T.sum() + result.entropy_T.sum(), weight)[0]
    assert torch.isfinite(gradient).all()


@interpreter_only
def test_logprob_of_no_token():
    hidden, weight, tokens = problem()
    with only("linear_logprob", "triton"):
        result = linear_logprob(hidden[:0], weight, tokens[:0])
    assert result.logprob_T.shape == result.entropy_T.shape == (0,)
    assert torch.autograd.grad(result.logprob_T.sum(), weight)[0].abs().max() == 0


@interpreter_only
def test_a_teacher_of_another_vocabulary_is_refused():
    hidden, weight, tokens = problem()
    teacher = {"teacher_hidden_TD": hidden.detach(), "teacher_weight_VD": torch.randn(310, 8), "jsd_beta": 0.5}
    with only("linear_logprob", "triton"), pytest.raises(ValueError, match="310 rows and the student's 301"):
        linear_logprob(hidden, weight, tokens, **teacher)


def test_chunks_fill_whole_waves_and_never_exceed_the_budget():
    rows = head_products.rows_per_chunk
    assert rows(16384, 151_936, 2048, 3290) == 2048
    assert rows(16384, 151_936, 2048, 4200) == 4096
    for tokens in (1, 5, 127, 128, 129, 1000, 4096, 100_000):
        for most in (1, 128, 1000, 5000):
            assert 1 <= rows(tokens, 151_936, 2048, most) <= min(tokens, max(most, 128))
    assert rows(0, 100, 8, 50) == 1


@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=interpreter_only)]
)
def test_opcheck(small_blocks, device):
    hidden, weight, targets = problem(tokens=3, device=device)
    arguments = (hidden, weight, targets, None, -100, 0.1, 290, True, True)
    torch.library.opcheck(linear_cross_entropy_triton._forward, arguments)
    scale = torch.tensor(2.0, device=device)
    torch.library.opcheck(linear_cross_entropy_triton._scaled, (weight.detach(), scale, torch.float16))
    teacher = torch.randn(3, 5, device=device), torch.randn(301, 5, device=device)
    torch.library.opcheck(linear_logprob_triton._forward, (hidden, weight, targets, 0.7, 290, *teacher, 0.5))
    torch.library.opcheck(linear_logprob_triton._forward, (hidden, weight, targets, 0.7, 290, None, None, None))


# ---- on a GPU, in bfloat16

SHAPES = [(1, 8_193, None), (515, 8_193, 8_000), (300, 151_936, 151_669)]


def real(tokens, width=512, vocab=8_193, dtype=torch.bfloat16):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, device="cuda") * width**-0.5 * 2).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,), device="cuda")


def exact(hidden, weight):
    return (x.detach().float().requires_grad_() for x in (hidden, weight))


def relative(ours, truth):
    return ((ours.float() - truth).norm() / truth.norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, vocab, valid", [*SHAPES, (4_096, 32_000, None)])
def test_bfloat16_cross_entropy_errs_no_more_than_eager(tokens, vocab, valid, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy_triton, "LOGITS_BYTES", 1 << 26)
    hidden, weight, targets = real(tokens, vocab=vocab)
    targets = targets % (valid or vocab)
    targets[1::7] = -100
    options = {"z_loss_weight": 1e-3, "valid_vocab": valid, "loss_weights_T": torch.rand(tokens, device="cuda")}
    truth, true_grads = cross_entropy("reference", *exact(hidden, weight), targets, 0.3, **options)
    eager, eager_grads = cross_entropy("reference", hidden, weight, targets, 0.3, **options)
    ours, our_grads = cross_entropy("triton", hidden, weight, targets, 0.3, **options)
    for a, b, c in zip((*ours, *our_grads), (*eager, *eager_grads), (*truth, *true_grads), strict=True):
        assert relative(a, c) <= 1.5 * relative(b, c) + 1e-4
    assert our_grads[0].dtype == our_grads[1].dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("jsd_beta", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("tokens, vocab, valid", SHAPES)
def test_bfloat16_logprob_errs_less_than_eager(tokens, vocab, valid, jsd_beta, monkeypatch):
    monkeypatch.setattr(linear_logprob_triton, "LOGITS_BYTES", 1 << 27)
    hidden, weight, token_ids = real(tokens, vocab=vocab)
    token_ids = token_ids % (valid or vocab)
    options = {"temperature": 0.8, "valid_vocab": valid}
    teacher = real(tokens, 256, vocab)
    if jsd_beta is not None:
        options["jsd_beta"] = jsd_beta
    values = {}
    for name in ("truth", "reference", "triton"):
        inputs = (hidden, weight) if name != "truth" else tuple(exact(hidden, weight))
        heads = teacher[:2] if name != "truth" else tuple(exact(*teacher[:2]))
        if jsd_beta is not None:
            options["teacher_hidden_TD"], options["teacher_weight_VD"] = (x.detach() for x in heads)
        with only("linear_logprob", "reference" if name == "truth" else name):
            scores = [x for x in linear_logprob(*inputs, token_ids, **options) if x is not None]
        upstream = [torch.linspace(-1, 2, tokens, device="cuda") for _ in scores]
        values[name] = [*scores, *torch.autograd.grad(scores, inputs, upstream)]
    for ours, eager, truth in zip(values["triton"], values["reference"], values["truth"], strict=True):
        assert relative(ours, truth) <= 1.5 * relative(eager, truth) + 1e-5
    torch.testing.assert_close(values["triton"][0], values["truth"][0], rtol=0, atol=1e-4)  # the logits are not rounded


@pytest.mark.gpu
def test_both_are_deterministic():
    hidden, weight, targets = real(2_000, vocab=30_000)

    def once():
        result, grads = cross_entropy("triton", hidden, weight, targets)
        scores = linear_logprob(hidden, weight, targets)
        more = torch.autograd.grad(scores.logprob_T.sum() + scores.entropy_T.sum(), (hidden, weight))
        return *result, *grads, scores.logprob_T, scores.entropy_T, *more

    first = once()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def float32_head_gradient(hidden, weight, targets, rows=2_048):
    """That of cross-entropy, in float32 throughout, a chunk at a time."""
    weight_VD = weight.detach().float()
    grad_VD = torch.zeros_like(weight_VD)
    for hidden_RD, target_R in zip(hidden.detach().float().split(rows), targets.split(rows), strict=True):
        grad_RV = (hidden_RD @ weight_VD.t()).softmax(-1)
        grad_RV.scatter_add_(1, target_R[:, None], -torch.ones_like(grad_RV[:, :1]))
        grad_VD.addmm_(grad_RV.t(), hidden_RD)
    return grad_VD


@pytest.mark.gpu
def test_many_tokens_and_a_real_head():
    hidden, weight, targets = real(131_072, 256, 151_936)
    targets %= 1_000  # 131 tokens for each of these: what chunks add up to is worth comparing
    result, grads = cross_entropy("triton", hidden, weight, targets)
    last = slice(131_000, None)
    few, few_grads = cross_entropy("triton", hidden[last].detach().requires_grad_(), weight, targets[last])
    torch.testing.assert_close(result.nll_T[last], few.nll_T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grads[0][last], few_grads[0], rtol=2e-2, atol=1e-4)
    assert math.isfinite(result.loss)
    truth = float32_head_gradient(hidden, weight, targets)
    # Rows of targets: rounding the sum once, 2**-9 at most. Others: that of the logits, 2**-9 of up to 8 at random.
    assert relative(grads[1][:1_000], truth[:1_000]) < 3e-3
    assert relative(grads[1][1_000:], truth[1_000:]) < 1.5e-2


@pytest.mark.gpu
def test_memory_of_a_real_head():
    hidden, weight, targets = real(16_384, 2_048, 151_936)
    cross_entropy("triton", hidden, weight, targets)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cross_entropy("triton", hidden, weight, targets)
    assert torch.cuda.max_memory_allocated() - before < 2.5e9


@pytest.mark.gpu
def test_torch_compile_and_cuda_graph():
    hidden, weight, targets = real(512, 256, 5_001)

    def step(hidden, weight):
        ce = linear_cross_entropy(hidden, weight, targets)
        scores = linear_logprob(hidden, weight, targets, temperature=0.9)
        loss = ce.loss + scores.logprob_T.sum() + scores.entropy_T.mean()
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    def forward(hidden, weight):
        scores = linear_logprob(hidden, weight, targets, temperature=0.9)
        return linear_cross_entropy(hidden, weight, targets).loss + scores.logprob_T.sum() + scores.entropy_T.mean()

    expected = step(hidden, weight)
    loss = torch.compile(forward, fullgraph=True)(hidden, weight)
    compiled = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    assert_same(compiled, expected, rtol=1e-2, atol=1e-2)

    # Fresh leaves: those above have gradients that the engine would bring to the default stream, which is not captured.
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(*leaves)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_autocast_with_float32_weights():
    hidden, weight, targets = real(300, 256, 5_000, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        ours, grads = cross_entropy("triton", hidden, weight, targets)
    truth, true_grads = cross_entropy("reference", hidden, weight, targets)
    torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-3, atol=0)
    assert grads[0].dtype == grads[1].dtype == torch.float32
    assert all(relative(a, b) < 2e-2 for a, b in zip(grads, true_grads, strict=True))
