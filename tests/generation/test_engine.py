"""The engine against the plain forward pass, and against itself in other circumstances."""

import pytest
import torch

from qwen3_lit.errors import UserError
from qwen3_lit.generation.engine import PagedEngine
from qwen3_lit.generation.protocol import RolloutEngine
from qwen3_lit.generation.sampling import Completion, SamplingParams
from qwen3_lit.generation.thinking import ThinkingTokens
from qwen3_lit.model.config import DualChunkConfig, ModelConfig, YarnConfig
from qwen3_lit.model.transformer import Qwen3

VOCAB, VALID = 80, 73
THINK, END_THINK, TURN, STOP = 60, 61, 62, 63
STOP_THINKING = [64, END_THINK, 65]

SHAPES = {
    "dense": {"num_experts": 0},
    "moe": {},
    "mixed": {"mlp_only_layers": [0], "norm_topk_prob": False, "tie_word_embeddings": True},
    "yarn": {"rope_scaling": YarnConfig(4.0, 16)},
    "dual_chunk": {"dual_chunk": DualChunkConfig(12, 4)},
    "dual_chunk_yarn": {"dual_chunk": DualChunkConfig(9, 2), "rope_scaling": YarnConfig(2.0, 16), "num_experts": 0},
}


def make_model(**changes: object) -> Qwen3:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "rope_theta": 1e4,
        "initializer_range": 0.15,  # sharp enough that greedy paths differ and errors show
    }
    return Qwen3(ModelConfig(**{**settings, **changes}))


def make_engine(model: Qwen3, **changes: object) -> PagedEngine:
    settings = {
        "page_size": 4,
        "max_batch_size": 16,
        "max_cached_tokens": 4096,
        "valid_vocab": VALID,
        "thinking": ThinkingTokens(END_THINK, tuple(STOP_THINKING), THINK, TURN),
        "seed": 5,
    }
    return PagedEngine(model, **{**settings, **changes})


@torch.no_grad()
def plain_logits(model: Qwen3, tokens: list[int]) -> torch.Tensor:
    """Logits [T, V] of the packed forward over the valid vocabulary."""
    ids = torch.tensor(tokens)
    hidden = model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids)).hidden_TD
    return (hidden @ model.lm_head_weight.T)[:, :VALID]


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 60, (n,), generator=generator).tolist() for n in lengths]


def tokens_of(results: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids for c in group] for group in results]


def assert_no_leak(engine: PagedEngine) -> None:
    allocator = engine._cache.allocator
    assert allocator.num_free == allocator.num_pages
    assert (allocator._owners == 0).all()
    assert sorted(allocator._free.tolist()) == list(range(1, allocator.num_pages + 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_is_the_argmax_of_the_plain_forward(shape: str) -> None:
    model = make_model(**SHAPES[shape])
    prompts = prompts_of(1, 4, 7, 21, 30)
    engine = make_engine(model, max_batch_size=3)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=25, temperature=0))
    for prompt, [completion] in zip(prompts, results, strict=True):
        logits = plain_logits(model, prompt + completion.token_ids)[len(prompt) - 1 : -1]
        assert completion.token_ids == logits.argmax(-1).tolist()
        expected = logits.log_softmax(-1).amax(-1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)
        assert completion.finish_reason == "length" and all(completion.sampled_mask)
    assert_no_leak(engine)


@pytest.mark.parametrize("shape", ["moe", "dual_chunk", "yarn"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_the_packed_forward(shape: str, temperature: float) -> None:
    model = make_model(**SHAPES[shape])
    prompts = prompts_of(3, 8, 13)
    results = make_engine(model).generate(prompts, SamplingParams(max_new_tokens=20, temperature=temperature, n=3))
    for prompt, group in zip(prompts, results, strict=True):
        assert len({tuple(c.token_ids) for c in group}) == 3
        for completion in group:
            logits = plain_logits(model, prompt + completion.token_ids)[len(prompt) - 1 : -1]
            chosen = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])
            torch.testing.assert_close(torch.tensor(completion.logprobs), chosen.squeeze(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_batch_size": 1},
        {"max_batch_size": 5},
        {"page_size": 7},
        {"max_prefill_tokens": 8},
        {"max_cached_tokens": 48},  # one sequence barely fits: samples wait, prompts are dropped, sequences preempted
        {"max_cached_tokens": 100},
        {"max_cached_tokens": 160, "page_size": 1},
    ],
)
@pytest.mark.parametrize("shape", ["moe", "dual_chunk"])
def test_batch_and_cache_size_do_not_change_samples(shape: str, changes: dict[str, int]) -> None:
    model = make_model(**SHAPES[shape])
    prompts = prompts_of(12, 5, 17, 8, 1)
    params = [
        SamplingParams(max_new_tokens=m, n=n, record_routing=True)
        for m, n in ((30, 3), (9, 4), (22, 2), (1, 2), (30, 5))
    ]
    reference = make_engine(model)
    expected = reference.generate(prompts, params)
    engine = make_engine(model, **changes)
    results = engine.generate(prompts, params)
    assert tokens_of(results) == tokens_of(expected)
    for group, expected_group in zip(results, expected, strict=True):
        for completion, same in zip(group, expected_group, strict=True):
            assert completion.logprobs == pytest.approx(same.logprobs, abs=1e-4)
            if shape == "moe":
                assert torch.equal(completion.routed_experts, same.routed_experts)
    if changes.get("max_cached_tokens", 1000) <= 100:
        assert engine.num_preemptions > 0  # or this test does not try what it is for
    assert_no_leak(engine)


def test_group_prefill_equals_single_prompts() -> None:
    model = make_model()
    prompts = prompts_of(6, 9, 4)
    together = make_engine(model).generate(prompts, SamplingParams(max_new_tokens=10, temperature=0, n=2))
    alone = [make_engine(model).generate([p], SamplingParams(max_new_tokens=10, temperature=0))[0][0] for p in prompts]
    assert tokens_of(together) == [[c.token_ids] * 2 for c in alone]


def test_prompt_is_computed_once_a_group() -> None:
    model = make_model()
    fed = []
    model.register_forward_pre_hook(lambda module, args: fed.append(len(args[0])))
    make_engine(model).generate(prompts_of(10, 6), SamplingParams(max_new_tokens=3, n=4))
    assert fed == [16, 8, 8]


def test_stop_token_ends_and_slot_is_refilled() -> None:
    model = make_model()
    prompts = prompts_of(5, 5, 5, 5)
    free = make_engine(model).generate(prompts, SamplingParams(max_new_tokens=40, n=4))
    stopped = make_engine(model, max_batch_size=3).generate(
        prompts, SamplingParams(max_new_tokens=40, n=4, stop_token_ids=tuple(range(0, VALID, 9)))
    )
    reasons = set()
    for group, free_group in zip(stopped, free, strict=True):
        for completion, unstopped in zip(group, free_group, strict=True):
            ends = [i for i, t in enumerate(unstopped.token_ids) if t % 9 == 0]
            length = ends[0] + 1 if ends else 40
            assert completion.token_ids == unstopped.token_ids[:length]
            assert completion.finish_reason == ("stop" if ends else "length")
            reasons.add(completion.finish_reason)
    assert "stop" in reasons


@pytest.mark.parametrize("max_cached_tokens", [4096, 60])
def test_thinking_budget_splices_the_stop_sentence(max_cached_tokens: int) -> None:
    model = make_model()
    prompts = [[TURN, 5, 6, TURN, THINK], [TURN, 5, TURN, THINK, END_THINK], [TURN, 7]]
    params = SamplingParams(max_new_tokens=24, n=6, thinking_budget=5)
    engine = make_engine(model, max_batch_size=7, max_cached_tokens=max_cached_tokens)
    results = engine.generate(prompts, params)
    spliced = 0
    for prompt, group in zip(prompts, results, strict=True):
        for completion in group:
            turn = prompt[len(prompt) - prompt[::-1].index(TURN) :] + completion.token_ids
            given = len(turn) - len(completion.token_ids)
            forced = [i + given for i, sampled in enumerate(completion.sampled_mask) if not sampled]
            opened = turn.index(THINK) if THINK in turn else None
            closed = turn.index(END_THINK) if END_THINK in turn else len(turn)
            late = opened is not None and closed > opened + 5 and opened + 6 < len(turn)
            if late:
                spliced += 1
                assert [turn[i] for i in forced] == STOP_THINKING[: len(forced)]
                assert forced == list(range(opened + 6, min(opened + 9, len(turn))))
                logits = plain_logits(model, prompt + completion.token_ids)[len(prompt) - 1 : -1]
                expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
                assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
            else:
                assert not forced
            assert len(completion.token_ids) == 24  # the answer goes on after the splice
    assert spliced >= 3
    assert not any(not all(c.sampled_mask) for c in results[1])
    assert_no_leak(engine)


def test_budget_of_zero_closes_at_once() -> None:
    [[completion]] = make_engine(make_model()).generate(
        [[TURN, THINK]], SamplingParams(max_new_tokens=6, thinking_budget=0)
    )
    assert completion.token_ids[:3] == STOP_THINKING
    assert completion.sampled_mask == [False] * 3 + [True] * 3


@pytest.mark.parametrize("max_cached_tokens", [4096, 64])
def test_on_stop_forces_tokens_and_goes_on(max_cached_tokens: int) -> None:
    model = make_model()
    stops = tuple(range(0, 40))
    calls: list[tuple[int, int, int]] = []

    def on_stop(prompt: int, sample: int, tokens: list[int]) -> list[int] | None:
        calls.append((prompt, sample, len(tokens)))
        assert tokens[-1] in stops
        return [STOP, 3, TURN] if tokens.count(TURN) < 2 else None

    engine = make_engine(model, max_cached_tokens=max_cached_tokens)
    params = SamplingParams(max_new_tokens=30, n=4, stop_token_ids=stops)
    prompts = prompts_of(6, 9)
    results = engine.generate(prompts, params, on_stop=on_stop)
    resumed = 0
    for prompt, group in zip(prompts, results, strict=True):
        for completion in group:
            logits = plain_logits(model, prompt + completion.token_ids)[len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
            forced = [
                t for t, sampled in zip(completion.token_ids, completion.sampled_mask, strict=True) if not sampled
            ]
            assert forced == ([STOP, 3, TURN] * 5)[: len(forced)]
            resumed += len(forced) >= 3
            if completion.finish_reason == "stop":
                assert completion.token_ids[-1] in stops and completion.sampled_mask[-1]
            else:
                assert len(completion.token_ids) == 30
    assert resumed >= 4 and calls
    assert_no_leak(engine)


@pytest.mark.parametrize("shape", ["moe", "mixed"])
def test_recorded_routing_equals_the_models(shape: str) -> None:
    model = make_model(**SHAPES[shape])
    prompts = prompts_of(5, 10)
    results = make_engine(model).generate(
        prompts, [SamplingParams(max_new_tokens=9, n=2, record_routing=True), SamplingParams(max_new_tokens=9)]
    )
    for completion in results[0]:
        tokens = torch.tensor(prompts[0] + completion.token_ids)
        bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
        with torch.no_grad():
            routing = model(tokens, torch.arange(len(tokens)), bounds, len(tokens), record_routing=True).routing
        assert completion.routed_experts.dtype == torch.uint8
        assert torch.equal(completion.routed_experts, routing.expert_ids_LTK.transpose(0, 1)[:-1])
    assert results[1][0].routed_experts is None


def test_state_dict_repeats_the_samples() -> None:
    engine = make_engine(make_model())
    prompts, params = prompts_of(4), SamplingParams(max_new_tokens=12, n=4)
    engine.generate(prompts, params)
    state = engine.state_dict()
    first = tokens_of(engine.generate(prompts, params))
    assert tokens_of(engine.generate(prompts, params)) != first
    other = make_engine(make_model(), seed=99)
    other.load_state_dict(state)
    assert tokens_of(other.generate(prompts, params)) == first


def test_first_token_follows_the_models_distribution() -> None:
    model = make_model(num_experts=0, initializer_range=0.08)
    prompt = [3, 1, 4]
    [group] = make_engine(model, max_batch_size=512).generate([prompt], SamplingParams(max_new_tokens=1, n=6000))
    probabilities = plain_logits(model, prompt)[-1].softmax(-1).double()
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in group]), minlength=VALID).double()
    expected = probabilities * 6000
    small = expected < 5
    statistic = ((counts - expected) ** 2 / expected)[~small].sum()
    freedom = int((~small).sum())
    assert freedom > 20
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_ids_past_the_valid_vocabulary_are_never_drawn() -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[VALID:] *= 100
    results = make_engine(model).generate(prompts_of(4), SamplingParams(max_new_tokens=50, n=8))
    assert max(t for c in results[0] for t in c.token_ids) < VALID


def test_filters_and_penalty_in_the_engine() -> None:
    model = make_model()
    params = SamplingParams(max_new_tokens=12, temperature=0, presence_penalty=2.0)
    [prompt] = prompts_of(6)
    [[completion]] = make_engine(model).generate([prompt], params)
    tokens: list[int] = []
    for token in completion.token_ids:
        logits = plain_logits(model, prompt + tokens)[-1]
        logits[tokens] -= 2.0
        assert token == logits.argmax()
        tokens.append(token)
    [[top1]] = make_engine(model).generate([prompt], SamplingParams(max_new_tokens=12, top_k=1))
    [[greedy]] = make_engine(model).generate([prompt], SamplingParams(max_new_tokens=12, temperature=0))
    assert top1.token_ids == greedy.token_ids


def test_training_goes_on_after_generation() -> None:
    model = make_model()
    model.train()
    make_engine(model).generate(prompts_of(5), SamplingParams(max_new_tokens=4))
    assert model.training
    tokens = torch.arange(6)
    model(tokens, tokens, torch.tensor([0, 6], dtype=torch.int32), 6).hidden_TD.sum().backward()
    assert all(p.grad is not None for p in model.layers.parameters())


def test_new_weights_are_seen_at_once() -> None:
    model = make_model()
    engine = make_engine(model)
    params, [prompt] = SamplingParams(max_new_tokens=8, temperature=0), prompts_of(5)
    before = engine.generate([prompt], params)[0][0].token_ids
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    after = engine.generate([prompt], params)[0][0].token_ids
    assert after != before
    assert after == plain_logits(model, prompt + after)[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_interrupted_generation_leaves_a_usable_engine() -> None:
    engine = make_engine(make_model())

    def interrupt(*_: object) -> list[int]:
        raise KeyboardInterrupt

    params = SamplingParams(max_new_tokens=20, n=3, stop_token_ids=tuple(range(70)))
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts_of(5), params, on_stop=interrupt)
    engine.generate(prompts_of(5), params)
    assert_no_leak(engine)


def test_progress_and_tokens_are_reported() -> None:
    engine = make_engine(make_model(), max_batch_size=3)
    finished, streamed = [], {}
    results = engine.generate(
        prompts_of(3, 4),
        SamplingParams(max_new_tokens=6, n=2),
        progress=lambda done, total, tokens: finished.append((done, total, tokens)),
        on_token=lambda prompt, sample, token: streamed.setdefault((prompt, sample), []).append(token),
    )
    assert [f[:2] for f in finished] == [(1, 4), (2, 4), (3, 4), (4, 4)] and finished[-1][2] == 24
    assert all(streamed[i, j] == results[i][j].token_ids for i in range(2) for j in range(2))


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "prompt 0: seen no token"),
        ([VOCAB], SamplingParams(), f"seen token id {VOCAB}, expected 0 to {VOCAB - 1}"),
        ([1] * 50, SamplingParams(max_new_tokens=20), "need a cache of 69 tokens, seen max_cached_tokens 64"),
    ],
)
def test_requests_that_cannot_work_are_refused(prompt: list[int], params: SamplingParams, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_engine(make_model(), max_cached_tokens=64).generate([prompt], params)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="temperature: seen -1"):
        SamplingParams(temperature=-1)
    with pytest.raises(UserError, match="valid_vocab: seen 81"):
        make_engine(make_model(), valid_vocab=81)
    with pytest.raises(UserError, match="thinking_budget is set"):
        PagedEngine(make_model()).generate([[1]], SamplingParams(thinking_budget=3))


def test_engine_is_a_rollout_engine() -> None:
    assert isinstance(make_engine(make_model()), RolloutEngine)


def test_under_autocast_the_cache_is_in_the_type_of_the_keys_and_samples_as_the_packed_forward_scores() -> None:
    model = make_model(num_experts=0)
    engine = make_engine(model)
    (prompt,) = prompts_of(7)
    with torch.autocast("cpu", torch.bfloat16):
        ((completion,),) = engine.generate([prompt], SamplingParams(max_new_tokens=12, temperature=1.0))
        logits_TV = plain_logits(model, prompt + completion.token_ids).float()
    assert engine._cache.dtype == torch.bfloat16
    expected_T = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1]
    expected_T = expected_T.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected_T, rtol=0.05, atol=0.05)
    engine.generate([prompt], SamplingParams(max_new_tokens=2))
    assert engine._cache.dtype == torch.float32
