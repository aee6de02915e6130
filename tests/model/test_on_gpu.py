"""The same package on a GPU: the reference operations, a training step in bfloat16, and the engine."""

import pytest
import torch
from qwen3_kernels import linear_cross_entropy, linear_logprob

from qwen3_lit.generation.engine import PagedEngine
from qwen3_lit.generation.model_runner import ModelRunner
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.model.config import DualChunkConfig, ModelConfig
from qwen3_lit.model.transformer import Qwen3

pytestmark = pytest.mark.gpu


def config(**changes):
    sizes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
    sizes |= {"num_key_value_heads": 2, "moe_intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 4}
    return ModelConfig(**{**sizes, "initializer_range": 0.1, **changes})


def row(device, lengths=(17, 40, 3)):
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(0, 320, (sum(lengths),), generator=generator)
    position_T = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return ids_T.to(device), position_T.to(device), cu_seqlens.to(device), max(lengths)


def loss_and_gradients(model, device):
    model = model.to(device)
    inputs = row(device)
    hidden_TD = model(*inputs).hidden_TD
    loss = linear_cross_entropy(hidden_TD, model.lm_head_weight, inputs[0].roll(-1)).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach().cpu().float(), [g.cpu().float() for g in gradients]


@pytest.mark.parametrize("chunks", [None, DualChunkConfig(12, 4)])
def test_loss_and_gradients_equal_the_cpu(chunks):
    torch.manual_seed(0)
    model = Qwen3(config(dual_chunk=chunks))
    loss, gradients = loss_and_gradients(model, "cpu")
    cuda_loss, cuda_gradients = loss_and_gradients(model, "cuda")
    torch.testing.assert_close(cuda_loss, loss, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(cuda_gradients, gradients, strict=True):
        assert (ours - theirs).norm() <= 2e-3 * theirs.norm() + 1e-6


def test_bfloat16_is_close_to_float32():
    torch.manual_seed(0)
    model = Qwen3(config())
    loss, _ = loss_and_gradients(model, "cuda")
    rounded, gradients = loss_and_gradients(model.bfloat16(), "cuda")
    torch.testing.assert_close(rounded, loss, rtol=2e-2, atol=0)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_greedy_generation_equals_the_cpu():
    torch.manual_seed(0)
    model = Qwen3(config())
    prompts = [[1, 2, 3], list(range(30)), [7]]
    params = SamplingParams(max_new_tokens=24, temperature=0.0)
    engine = {"page_size": 4, "max_batch_size": 2, "max_cached_tokens": 512}
    on_cpu = [group[0].token_ids for group in PagedEngine(model, **engine).generate(prompts, params)]
    on_gpu = [group[0].token_ids for group in PagedEngine(model.to("cuda"), **engine).generate(prompts, params)]
    assert on_gpu == on_cpu


def test_sampler_and_trainer_give_one_log_probability_in_bfloat16():
    torch.manual_seed(0)
    model = Qwen3(config()).to("cuda").bfloat16()
    runner = ModelRunner(model, cache=None, valid_vocab=320, record_routing=False)
    hidden_TD = torch.randn(50, 64, device="cuda").bfloat16()
    token_ids_T = torch.randint(320, (50,), device="cuda")
    sampled_T = runner.logits(hidden_TD).log_softmax(-1).gather(1, token_ids_T[:, None]).squeeze(1)
    trained_T = linear_logprob(hidden_TD, model.lm_head_weight, token_ids_T).logprob_T
    torch.testing.assert_close(sampled_T, trained_T, rtol=0, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_on_the_second_gpu_while_the_first_is_current(compiled):
    torch.manual_seed(0)
    model = Qwen3(config())
    loss, gradients = loss_and_gradients(model, "cuda:0")
    if compiled:
        model.compile_blocks()
    assert torch.cuda.current_device() == 0
    other_loss, other_gradients = loss_and_gradients(model, "cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(other_gradients, gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7
