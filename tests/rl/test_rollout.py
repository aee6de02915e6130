"""Modes, stop tokens, masks, and a packed policy loss that equals the padded one."""

import pytest
import torch

from qwen3_lit.data.chat_template import EMPTY_THINKING
from qwen3_lit.errors import UserError
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.losses.policy_gradient import DrGRPOLoss, GRPOLoss, GSPOLoss, PolicyInputs, SAPOLoss
from qwen3_lit.rl.rewards.format import FormatReward
from qwen3_lit.rl.rewards.math_answer import MathAnswerReward
from qwen3_lit.rl.rewards.workers import RewardPool
from qwen3_lit.rl.rollout import Rollout, apply_mode, collect, reward_input, score_rollouts, to_packed

USER = [{"role": "user", "content": "What is 3 + 4?"}]
THOUGHT = "<think>\n3 + 4\n</think>\n\n7"


def test_collect_fills_everything_a_reward_and_a_loss_need(tokenizer, scripted) -> None:
    problems = [
        {"messages": USER, "answer": "7", "task": "add"},
        {"prompt": "And 1 + 1?", "answer": "2", "task": "add"},
    ]
    engine = scripted(lambda prompt, sample: [THOUGHT if sample == 0 else "<think>\nhm"])
    rollouts = collect(engine, tokenizer, problems, SamplingParams(n=2), policy_version=5, first_group_id=10)
    assert [r.group_id for r in rollouts] == [10, 10, 11, 11]
    first = rollouts[0]
    assert tokenizer.decode(first.prompt_ids).endswith("<|im_start|>assistant\n")
    assert first.completion_ids[-1] == tokenizer.im_end_id and first.trained_mask[-1], "the stop token is trained"
    assert first.text == THOUGHT and first.policy_version == 5
    seen = reward_input(first)
    assert (seen.thinking, seen.answer, seen.mode) == ("3 + 4", "7", "think")
    unclosed = reward_input(rollouts[1])
    assert (unclosed.thinking, unclosed.answer) == ("hm", "")
    assert reward_input(rollouts[2]).messages == [{"role": "user", "content": "And 1 + 1?"}]
    with RewardPool([MathAnswerReward(), FormatReward()], num_workers=1) as pool:
        score_rollouts(rollouts, pool)
    assert [r.reward for r in rollouts] == [1.0, 0.0, 0.5, 0.0]
    assert rollouts[2].rewards == {"math_answer": 0.0, "format": 1.0}


def test_a_task_without_reward_is_an_error_that_names_it(tokenizer, scripted) -> None:
    engine = scripted(lambda prompt, sample: [THOUGHT])
    rollouts = collect(engine, tokenizer, [{"messages": USER, "answer": "7", "task": "add"}], SamplingParams())
    with RewardPool([FormatReward(tasks=["other"])]) as pool, pytest.raises(UserError, match="task 'add'"):
        score_rollouts(rollouts, pool)


@pytest.mark.parametrize(
    ("text", "mode", "switch", "expected_text", "thinking_on"),
    [
        ("q", "think", "auto", "q", True),
        ("q", "no_think", "auto", "q", False),
        ("q /no_think", "no_think", "auto", "q /no_think", True),
        ("q /think", "think", "auto", "q /think", True),
        ("q /think", "no_think", "auto", "q /think /no_think", True),
        ("q/no_think", "no_think", "auto", "q/no_think", False),
        ("q", "no_think", "soft", "q /no_think", True),
        ("q /no_think", "no_think", "hard", "q /no_think", False),
    ],
)
def test_how_a_mode_is_asked_for(text: str, mode: str, switch: str, expected_text: str, thinking_on: bool) -> None:
    messages, enable_thinking = apply_mode([{"role": "user", "content": text}], mode, switch)  # type: ignore[arg-type]
    assert messages[-1]["content"] == expected_text and enable_thinking is thinking_on


def test_a_flag_in_the_text_is_the_mode_of_a_problem_that_names_none(tokenizer, scripted) -> None:
    engine = scripted(lambda prompt, sample: ["7"])
    problems = [
        {"messages": [{"role": "user", "content": text}], "answer": "7", "task": "add"}
        for text in ("3 + 4? /no_think", "3 + 4? /think", "3 + 4?")
    ]
    rollouts = collect(engine, tokenizer, problems, SamplingParams())
    assert [rollout.mode for rollout in rollouts] == ["no_think", "think", "think"]
    for rollout, problem in zip(rollouts, problems, strict=True):
        assert rollout.problem["messages"] == problem["messages"], "the text stays as it is"


def test_an_injected_think_block_belongs_to_the_text_but_not_to_the_completion(tokenizer, scripted) -> None:
    problem = {"messages": USER, "answer": "7", "task": "add", "mode": "no_think"}
    engine = scripted(lambda prompt, sample: ["7"])
    (rollout,) = collect(engine, tokenizer, [problem], SamplingParams())
    assert tokenizer.decode(rollout.prompt_ids).endswith(EMPTY_THINKING)
    assert rollout.text == EMPTY_THINKING + "7"
    assert tokenizer.decode(rollout.completion_ids) == "7<|im_end|>"
    assert reward_input(rollout).thinking == "" and FormatReward()(reward_input(rollout)) == 1.0


def make(prompt: int, completion: int, *, seed: int, forced: tuple[int, ...] = (), truncated: bool = False) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    return Rollout(
        prompt_ids=torch.randint(1, 50, (prompt,), generator=generator).tolist(),
        completion_ids=torch.randint(1, 50, (completion,), generator=generator).tolist(),
        logprobs=(-torch.rand(completion, generator=generator)).tolist(),
        trained_mask=[index not in forced for index in range(completion)],
        finish_reason="length" if truncated else "stop",
        mode="think",
        group_id=seed,
        problem={"task": "t"},
        advantage=float(torch.randn((), generator=generator)),
    )


ROLLOUTS = [
    make(3, 5, seed=0),
    make(1, 1, seed=1),
    make(4, 7, seed=2, forced=(2, 3)),
    make(2, 6, seed=3, truncated=True),
]


def test_every_trained_token_is_aligned_with_its_own_logprob() -> None:
    batch = to_packed(ROLLOUTS, num_tokens=40, max_documents=6)
    assert batch.packed.token_ids_T.shape == (40,) and batch.packed.cu_seqlens.shape == (8,)
    start, checked = 0, 0
    for index, rollout in enumerate(ROLLOUTS):
        for place, (token, logprob, trained) in enumerate(
            zip(rollout.completion_ids, rollout.logprobs, rollout.trained_mask, strict=True)
        ):
            at = start + len(rollout.prompt_ids) + place - 1
            on = trained and not rollout.truncated
            assert bool(batch.mask_T[at]) is on
            assert batch.packed.target_ids_T[at] == (token if on else -100)
            assert batch.old_logprob_T[at] == pytest.approx(logprob if on else 0.0)
            assert batch.advantage_T[at] == pytest.approx(rollout.advantage if on else 0.0)
            assert batch.sequence_ids_T[at] == index
            checked += on
        start += rollout.num_tokens
    assert int(batch.mask_T.sum()) == checked == batch.num_trained_tokens
    assert checked == sum(rollout.num_trained_tokens() for rollout in ROLLOUTS)
    assert batch.num_sequences == 3
    assert torch.equal(batch.mask_T, batch.packed.target_ids_T != -100)


def test_truncated_completions_are_trained_on_request() -> None:
    assert to_packed(ROLLOUTS, mask_truncated=False).num_trained_tokens == 5 + 1 + 5 + 6


def padded_inputs(logits_per_rollout: list[torch.Tensor]) -> PolicyInputs:
    """[rollouts, longest] with right padding, flattened: the layout packing has to agree with."""
    longest = max(rollout.num_tokens for rollout in ROLLOUTS)
    rows: dict[str, list[torch.Tensor]] = {"logprob": [], "old": [], "advantage": [], "mask": [], "ids": []}
    for index, (rollout, logits_TV) in enumerate(zip(ROLLOUTS, logits_per_rollout, strict=True)):
        tokens = torch.tensor([*rollout.prompt_ids, *rollout.completion_ids])
        logprob = logits_TV.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        mask = torch.tensor([False] * (len(rollout.prompt_ids) - 1) + rollout.trained_mask) & (not rollout.truncated)
        old = torch.tensor([0.0] * (len(rollout.prompt_ids) - 1) + rollout.logprobs)
        pad = longest - len(tokens) + 1
        rows["logprob"].append(torch.nn.functional.pad(logprob, (0, pad)))
        rows["old"].append(torch.nn.functional.pad(old, (0, pad)))
        rows["mask"].append(torch.nn.functional.pad(mask, (0, pad)))
        rows["advantage"].append(torch.full((longest,), rollout.advantage))
        rows["ids"].append(torch.full((longest,), index))
    flat = {name: torch.stack(values).flatten() for name, values in rows.items()}
    tokens, sequences = flat["mask"].sum(), torch.tensor(3)
    return PolicyInputs(flat["logprob"], flat["old"], flat["advantage"], flat["mask"], flat["ids"], tokens, sequences)


@pytest.mark.parametrize(
    "loss", [GRPOLoss(), DrGRPOLoss(16), GSPOLoss(), SAPOLoss()], ids=lambda loss: type(loss).__name__
)
def test_packed_policy_loss_equals_the_padded_one(loss) -> None:
    torch.manual_seed(0)
    embedding = torch.randn(50, 50, requires_grad=True)  # a bigram model: the logits depend on the token alone
    padded = padded_inputs([embedding[torch.tensor([*r.prompt_ids, *r.completion_ids])] for r in ROLLOUTS])
    expected = loss(padded)
    expected.loss.backward()
    expected_grad, embedding.grad = embedding.grad, None
    batch = to_packed(ROLLOUTS, num_tokens=40)
    logprob_TV = embedding[batch.packed.token_ids_T].log_softmax(-1)
    logprob_T = logprob_TV.gather(1, batch.packed.target_ids_T.clamp(min=0)[:, None])[:, 0]
    found = loss(
        PolicyInputs(
            logprob_T,
            batch.old_logprob_T,
            batch.advantage_T,
            batch.mask_T,
            batch.sequence_ids_T,
            batch.mask_T.sum(),
            torch.tensor(batch.num_sequences),
        )
    )
    found.loss.backward()
    assert expected_grad is not None and expected_grad.abs().sum() > 0
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(embedding.grad, expected_grad, rtol=1e-5, atol=1e-7)


def test_recorded_experts_line_up_with_their_tokens() -> None:
    rollouts = [make(3, 5, seed=0), make(4, 7, seed=2)]
    for rollout in rollouts:
        rows = rollout.num_tokens - 1
        rollout.routed_experts = torch.arange(rows * 2 * 3, dtype=torch.uint8).view(rows, 2, 3) + rollout.group_id
    batch = to_packed(rollouts, num_tokens=24)
    experts_LTK = batch.replay_expert_ids_LTK
    assert experts_LTK is not None and experts_LTK.shape == (2, 24, 3) and experts_LTK.dtype == torch.int64
    for layer in range(2):
        assert torch.equal(experts_LTK[layer, :7], rollouts[0].routed_experts[:, layer].long())
        assert torch.equal(experts_LTK[layer, 8:18], rollouts[1].routed_experts[:, layer].long())
    rollouts[1].routed_experts = None
    with pytest.raises(UserError, match="record_routing"):
        to_packed(rollouts)
