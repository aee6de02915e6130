"""Rollouts from the real engine: what it reports is what the trainer computes on the packed row."""

import torch

from qwen3_lit.generation.engine import PagedEngine
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.transformer import Qwen3
from qwen3_lit.rl.rollout import collect, to_packed


def test_packed_logprobs_and_experts_equal_the_engines(tokenizer) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        initializer_range=0.5,
    )
    model = Qwen3(config)
    engine = PagedEngine.for_tokenizer(model, tokenizer, max_cached_tokens=4096, max_batch_size=8)
    problems = [{"prompt": "3 + 4?", "task": "a"}, {"prompt": "Which number is it?", "task": "a", "mode": "no_think"}]
    rollouts = collect(engine, tokenizer, problems, SamplingParams(max_new_tokens=12, n=3, record_routing=True))
    assert [rollout.group_id for rollout in rollouts] == [0, 0, 0, 1, 1, 1]
    batch = to_packed(rollouts, mask_truncated=False, num_tokens=512)
    packed = batch.packed
    with torch.no_grad():
        output = model(
            packed.token_ids_T,
            packed.position_ids_T,
            packed.cu_seqlens,
            packed.max_seqlen,
            token_mask_T=packed.token_mask_T,
            record_routing=True,
        )
    logits_TV = output.hidden_TD @ model.lm_head_weight.T
    logprob_T = logits_TV.log_softmax(-1).gather(1, packed.target_ids_T.clamp(min=0)[:, None])[:, 0]
    assert int(batch.mask_T.sum()) == sum(sum(rollout.trained_mask) for rollout in rollouts) > 30
    torch.testing.assert_close(logprob_T[batch.mask_T], batch.old_logprob_T[batch.mask_T], rtol=0, atol=1e-4)
    assert batch.replay_expert_ids_LTK is not None and output.routing is not None
    for start, end in packed.document_spans():
        recorded = batch.replay_expert_ids_LTK[:, start : end - 1].sort(-1).values
        computed = output.routing.expert_ids_LTK[:, start : end - 1].long().sort(-1).values
        assert torch.equal(recorded, computed)


def test_replayed_routing_reaches_the_model(tokenizer) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    )
    model = Qwen3(config)
    engine = PagedEngine.for_tokenizer(model, tokenizer, max_cached_tokens=1024, max_batch_size=4)
    params = SamplingParams(max_new_tokens=6, n=2, record_routing=True)
    rollouts = collect(engine, tokenizer, [{"prompt": "3 + 4?", "task": "a"}], params)
    for rollout in rollouts:
        assert rollout.routed_experts is not None
        rollout.routed_experts = torch.tensor([[[2, 3]]], dtype=torch.uint8).expand(rollout.num_tokens - 1, 1, 2)
    batch = to_packed(rollouts)
    packed = batch.packed
    routing = model(
        packed.token_ids_T,
        packed.position_ids_T,
        packed.cu_seqlens,
        packed.max_seqlen,
        replay_expert_ids_LTK=batch.replay_expert_ids_LTK,
    ).routing
    assert routing.counts_LE.tolist() == [[0, 0, packed.num_tokens, packed.num_tokens]]
