"""Compiled blocks compute what eager ones do, in one graph a kind of block, and leave generation and names alone."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest
import torch
from qwen3_kernels import dispatch

from qwen3_lit.generation.engine import PagedEngine
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.model.config import DualChunkConfig, ModelConfig
from qwen3_lit.model.transformer import Qwen3

OPAQUE_OPS = ("dual_chunk_attention", "router_topk", "grouped_experts")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model(num_layers: int = 2, **changes) -> Qwen3:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": num_layers, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2}
    return Qwen3(ModelConfig(**{**sizes, "moe_intermediate_size": 16, "initializer_range": 0.1, **changes})).to(DEVICE)


def outputs_and_gradients(qwen: Qwen3, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths)
    ids_T = torch.randint(97, (total,), generator=generator).to(DEVICE)
    position_T = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), *[total] * (6 - len(lengths))])
    out = qwen(ids_T, position_T, bounds.int().to(DEVICE), max(lengths))
    weight_TD = torch.randn(out.hidden_TD.shape, generator=generator).to(DEVICE)
    loss = (out.hidden_TD * weight_TD).sum()
    values = [out.hidden_TD]
    if out.routing is not None:
        loss = loss + out.routing.prob_sum_LE.square().sum() + out.routing.z_sum_L.sum()
        values += [out.routing.counts_LE.float(), out.routing.prob_sum_LE, out.routing.z_sum_L]
    gradients = torch.autograd.grad(loss, [p for n, p in qwen.named_parameters() if n != "lm_head.weight"])
    return [x.detach().clone() for x in (*values, *gradients)]


def assert_same(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for value, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def by_triton(*ops: str) -> Iterator[None]:
    """These operations by their Triton kernels: on the GPU, or in the interpreter."""
    missing = [op for op in ops if "triton" not in dispatch.implementations(op)]
    if missing:
        pytest.skip(f"no Triton kernel of {', '.join(missing)}: triton is not installed")
    with contextlib.ExitStack() as stack:
        if DEVICE == "cpu":
            stack.enter_context(dispatch.interpreted())
        for op in ops:
            stack.enter_context(dispatch.prefer(op, "triton"))
        yield


@pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler on a CPU")
def test_inductor_computes_what_eager_does() -> None:
    compiled = model(num_layers=1, num_experts=0)
    compiled.compile_blocks(fullgraph=False)  # the reference operations break graphs
    eager = model(num_layers=1, num_experts=0)
    assert_same(outputs_and_gradients(compiled, (5, 9, 3)), outputs_and_gradients(eager, (5, 9, 3)))


def test_reference_operations_break_graphs_but_compute_the_same() -> None:
    compiled = model(mlp_only_layers=[0])
    compiled.compile_blocks(fullgraph=False, backend="aot_eager")
    eager = model(mlp_only_layers=[0])
    assert_same(outputs_and_gradients(compiled, (5, 9, 3)), outputs_and_gradients(eager, (5, 9, 3)))


@pytest.mark.parametrize("case", ["plain", "dual_chunk", "checkpointing"])
def test_the_kernels_leave_one_graph_for_all_blocks(case: str) -> None:
    chunks = DualChunkConfig(12, 4) if case == "dual_chunk" else None
    eager, compiled = (model(dual_chunk=chunks) for _ in range(2))
    compiled.compile_blocks(backend="aot_eager")
    compiled.activation_checkpointing = case == "checkpointing"
    # FSDP2's hooks are kept from the compiler in this way; inside of the graph one would break it.
    hook_calls: list[object] = []
    hook = torch.compiler.disable(lambda *arguments: hook_calls.append(arguments))
    for block in compiled.layers:
        block.register_forward_pre_hook(hook)
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()

    def compare(*lengths: int) -> None:
        # The rotation takes two thirds of the interpreter's time: once is enough.
        with by_triton(*OPAQUE_OPS, *(["qk_norm_rope"] if case == "plain" else [])):
            ours = outputs_and_gradients(compiled, lengths)
        assert_same(ours, outputs_and_gradients(eager, lengths))

    compare(5, 20, 3)
    assert graphs["unique_graphs"] == 1
    assert len(hook_calls) == len(compiled.layers) * (2 if case == "checkpointing" else 1)
    if case == "plain":
        compare(6, 11)
        compare(2, 7)
        assert graphs["unique_graphs"] == 2  # for one number of tokens, then for any


def test_generation_stays_eager_and_names_stay() -> None:
    eager, compiled = model(), model()
    compiled.compile_blocks(backend="aot_eager")
    assert list(compiled.state_dict()) == list(eager.state_dict())
    params = SamplingParams(max_new_tokens=6, temperature=0.0)
    # A graph over the engine's contexts, which write a cache, would be an error: fullgraph.
    ours, expected = (
        PagedEngine(m, page_size=4, max_cached_tokens=256).generate([[1, 2, 3], [7]], params)[0][0].token_ids
        for m in (compiled, eager)
    )
    assert ours == expected
