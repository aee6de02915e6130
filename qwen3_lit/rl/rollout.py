"""From problems to rollouts, and from rollouts to a packed row the policy losses read.

Legend: T tokens of a row, L MoE layers, K experts per token.

Mode of a problem. ``mode`` is what the completion is judged by; how the model is told is the *switch*. A problem whose
text carries ``/think`` or ``/no_think`` is left as it is and the model has to obey (soft). One that asks for
``no_think`` without a flag gets the empty think block in its prompt (hard), so that no text of the problem changes.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor

from qwen3_lit.data.batch import PackedBatch
from qwen3_lit.data.chat_template import EMPTY_THINKING, prompt_ids, requested_mode, split_thinking
from qwen3_lit.data.packing import Document, default_max_documents, pack_row
from qwen3_lit.data.tokenizer import TextTokenizer
from qwen3_lit.errors import UserError
from qwen3_lit.generation.protocol import Progress, RolloutEngine
from qwen3_lit.generation.sampling import Completion, SamplingParams
from qwen3_lit.rl.environment import Environment, find_environment, safe_tool_messages, tool_turn_ids
from qwen3_lit.rl.rewards.reward import FinishReason, Mode, RewardInput
from qwen3_lit.rl.rewards.workers import RewardPool

ModeSwitch = Literal["auto", "soft", "hard"]


@dataclass
class Rollout:
    """One completion of one problem, and what became of it."""

    prompt_ids: list[int]
    """Token ids of the rendered prompt, generation prompt included."""
    completion_ids: list[int]
    """Token ids of the completion: sampled and forced, with the closing stop token."""
    logprobs: list[float]
    """Log-probability of each completion token at the sampling temperature, under the policy that sampled it."""
    trained_mask: list[bool]
    """False for completion tokens that were forced rather than sampled."""
    finish_reason: FinishReason
    """`stop`, or `length` when the completion was cut."""
    mode: Mode
    """The mode in which the completion was asked for."""
    group_id: int
    """Rollouts of one prompt share it."""
    problem: dict[str, Any]
    """The problem record; `tools` holds what the model was shown."""
    text: str = ""
    """Text of the completion, with a think block that the prompt injected and without the closing stop token."""
    turns: list[dict[str, Any]] = field(default_factory=list)
    """Messages that the completion added: assistant turns (raw text) and tool results."""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """Score of each reward, None where it does not apply."""
    reward: float = 0.0
    """The rewards composed."""
    advantage: float = 0.0
    """Advantage of every trained token."""
    policy_version: int = 0
    """Optimizer steps taken by the policy that sampled it."""
    routed_experts: Tensor | None = None
    """[prompt + completion - 1, L, K] on the CPU: experts of every token that was fed to the model."""

    def __post_init__(self) -> None:
        lengths = {len(self.completion_ids), len(self.logprobs), len(self.trained_mask)}
        if len(lengths) != 1 or not self.prompt_ids or not self.completion_ids:
            raise ValueError(
                f"Rollout: {len(self.prompt_ids)} prompt tokens, {len(self.completion_ids)} completion tokens, "
                f"{len(self.logprobs)} log-probs, {len(self.trained_mask)} mask entries do not fit together"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def truncated(self) -> bool:
        """Whether the completion was cut."""
        return self.finish_reason == "length"

    def num_trained_tokens(self, mask_truncated: bool = True) -> int:
        """Tokens that enter the policy loss."""
        return 0 if mask_truncated and self.truncated else sum(self.trained_mask)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The rollout that :meth:`state_dict` describes."""
        return cls(**state)


@dataclass(frozen=True)
class RolloutBatch:
    """One packed row of rollouts. Position t of every tensor belongs to the prediction of token t + 1."""

    packed: PackedBatch
    """Prompt and completion of each rollout as one document; targets are -100 where nothing is trained."""
    old_logprob_T: Tensor
    """float32, the sampler's log-probability of the target; 0 where the mask is off."""
    advantage_T: Tensor
    """float32, 0 where the mask is off."""
    mask_T: Tensor
    """bool, True where the target was sampled and is trained."""
    sequence_ids_T: Tensor
    """int64, index of the document in the row; tail padding carries the last index and no mask."""
    replay_expert_ids_LTK: Tensor | None = None
    """int64 experts to route by, where the engine recorded them."""

    @property
    def num_sequences(self) -> int:
        """Rollouts in the row that have a trained token."""
        return int(self.sequence_ids_T[self.mask_T].unique().numel())

    @property
    def num_trained_tokens(self) -> int:
        """Positions with the mask on."""
        return int(self.mask_T.sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same row on `device`."""
        moved: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            moved[entry.name] = None if value is None else value.to(device, non_blocking=non_blocking)
        return type(self)(**moved)


@dataclass
class _Dialog:
    """Book-keeping of one completion while it is generated."""

    turns: list[dict[str, Any]] = field(default_factory=list)
    turn_start: int = 0


def problem_messages(problem: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a problem record, given as `messages` or as `prompt`."""
    if problem.get("messages"):
        return list(problem["messages"])
    if isinstance(problem.get("prompt"), str):
        return [{"role": "user", "content": problem["prompt"]}]
    raise UserError(f"problem of task {problem.get('task')!r}: neither `messages` nor `prompt` is given")


def apply_mode(
    messages: Sequence[dict[str, Any]], mode: Mode, switch: ModeSwitch = "auto"
) -> tuple[list[dict[str, Any]], bool]:
    """Messages and `enable_thinking` that ask for `mode`.

    `hard` uses the template's switch, `soft` appends the flag to the last user turn (the last flag wins). `auto` leaves
    a text whose last flag says `mode` alone, switches hard where there is no flag, and soft where the flag says the
    opposite.

    Raises:
        UserError: If a flag has to be appended and there is no user turn.
    """
    messages = list(messages)
    if switch == "auto":
        requested = requested_mode(messages)
        if requested == mode:
            return messages, True
        switch = "hard" if requested is None else "soft"
    if switch == "hard":
        return messages, mode == "think"
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "user":
            flag = "/think" if mode == "think" else "/no_think"
            messages[index] = {**messages[index], "content": f"{messages[index]['content']} {flag}"}
            return messages, True
    raise UserError("a problem without a user turn cannot carry a mode flag; use mode_switch: hard")


def collect(
    engine: RolloutEngine,
    tokenizer: TextTokenizer,
    problems: Sequence[dict[str, Any]],
    params: SamplingParams,
    environments: Sequence[Environment] = (),
    *,
    mode: Mode | None = None,
    mode_switch: ModeSwitch = "auto",
    policy_version: int = 0,
    first_group_id: int = 0,
    progress: Progress | None = None,
) -> list[Rollout]:
    """Sample `params.n` completions of every problem, tool turns included.

    Args:
        engine: samples; its log-probs are stored as they come.
        tokenizer: renders and decodes.
        problems: problem records; their own `mode` counts, else the last flag in their text, else `think`.
        params: stop tokens default to `<|im_end|>` and `<|endoftext|>`.
        environments: answer tool calls; the first that applies to a problem serves it.
        mode: overrides every problem's mode.
        mode_switch: how the mode is asked for; see :func:`apply_mode`.
        policy_version: stored in the rollouts.
        first_group_id: group id of the first problem; the others count on from there.
        progress: passed to the engine.

    Returns:
        list of Rollout, ordered by problem, `n` of each.
    """
    stops = params.stop_token_ids or (tokenizer.im_end_id, tokenizer.end_of_text_id)
    params = dataclasses.replace(params, stop_token_ids=stops)
    conversations: list[list[dict[str, Any]]] = []
    thinking_on: list[bool] = []
    modes: list[Mode] = []
    served: list[tuple[dict[str, Any], Environment | None]] = []
    prompts: list[list[int]] = []
    for problem in problems:
        environment = find_environment(environments, problem)
        tools = problem.get("tools") or (environment.tools if environment else None)
        asked = problem_messages(problem)
        wanted: Mode = mode or problem.get("mode") or requested_mode(asked) or "think"
        messages, enable_thinking = apply_mode(asked, wanted, mode_switch)
        record = {**problem, "messages": messages}
        if tools:
            record["tools"] = tools
        if mode is not None:
            record["mode"] = mode
        conversations.append(messages)
        thinking_on.append(enable_thinking)
        modes.append(wanted)
        served.append((record, environment))
        prompts.append(prompt_ids(tokenizer, messages, tools=tools, enable_thinking=enable_thinking))

    dialogs: dict[tuple[int, int], _Dialog] = {}

    def on_stop(prompt: int, sample: int, token_ids: list[int]) -> list[int] | None:
        environment = served[prompt][1]
        if environment is None or token_ids[-1] != tokenizer.im_end_id:
            return None
        dialog = dialogs.setdefault((prompt, sample), _Dialog())
        injected = "" if thinking_on[prompt] else EMPTY_THINKING
        text = injected + tokenizer.decode(token_ids[dialog.turn_start : -1])
        results = environment.step([*conversations[prompt], *dialog.turns], text)
        if not results:
            return None
        results = safe_tool_messages(results)
        forced = tool_turn_ids(tokenizer, results, thinking_on[prompt])
        dialog.turns.extend([{"role": "assistant", "content": text}, *results])
        dialog.turn_start = len(token_ids) + len(forced)
        return forced

    has_environment = any(environment for _, environment in served)
    groups = engine.generate(prompts, params, on_stop=on_stop if has_environment else None, progress=progress)
    rollouts: list[Rollout] = []
    for index, group in enumerate(groups):
        record = served[index][0]
        for sample, completion in enumerate(group):
            dialog = dialogs.get((index, sample), _Dialog())
            injected = "" if thinking_on[index] else EMPTY_THINKING
            ids = _without_stop(completion, stops)
            last_turn = injected + tokenizer.decode(ids[dialog.turn_start :])
            rollouts.append(
                Rollout(
                    prompt_ids=prompts[index],
                    completion_ids=completion.token_ids,
                    logprobs=completion.logprobs,
                    trained_mask=completion.sampled_mask,
                    finish_reason="length" if completion.finish_reason == "length" else "stop",
                    mode=modes[index],
                    group_id=first_group_id + index,
                    problem=record,
                    text=injected + tokenizer.decode(ids),
                    turns=[*dialog.turns, {"role": "assistant", "content": last_turn}],
                    policy_version=policy_version,
                    routed_experts=completion.routed_experts,
                )
            )
    return rollouts


def _without_stop(completion: Completion, stops: Sequence[int]) -> list[int]:
    ids = completion.token_ids
    return ids[:-1] if completion.finish_reason == "stop" and ids and ids[-1] in stops else ids


def reward_input(rollout: Rollout) -> RewardInput:
    """What rewards see of a rollout."""
    thinking, answer = split_thinking(rollout.turns[-1]["content"] if rollout.turns else rollout.text)
    return RewardInput(
        messages=problem_messages(rollout.problem),
        completion=rollout.text,
        thinking=thinking,
        answer=answer,
        problem=rollout.problem,
        finish_reason=rollout.finish_reason,
        mode=rollout.mode,
        num_tokens=len(rollout.completion_ids),
        turns=rollout.turns,
    )


def score_rollouts(rollouts: Sequence[Rollout], pool: RewardPool) -> None:
    """Fill `rewards` and `reward` of every rollout.

    Raises:
        UserError: If no weighted reward applies to one of them.
    """
    for rollout, scores in zip(rollouts, pool.score([reward_input(rollout) for rollout in rollouts]), strict=True):
        total = pool.combine(scores)
        if total is None:
            raise UserError(
                f"rewards: none applies to a problem of task {rollout.problem.get('task')!r} "
                f"(rewards: {', '.join(reward.name for reward in pool.rewards)}); add one or extend its `tasks`"
            )
        rollout.rewards = scores
        rollout.reward = total


def to_packed(
    rollouts: Sequence[Rollout],
    *,
    mask_truncated: bool = True,
    num_tokens: int | None = None,
    max_documents: int | None = None,
    pad_token_id: int = 0,
) -> RolloutBatch:
    """Put rollouts end to end into one row.

    Args:
        rollouts: one or more; each becomes a document of prompt + completion.
        mask_truncated: train nothing of completions that were cut (DAPO's overlong filtering).
        num_tokens: pad the row to this length; None leaves it as long as its documents.
        max_documents: fixes the length of `cu_seqlens`; None takes what the packer holds usual, or more if needed.
        pad_token_id: token of the padding.

    Raises:
        UserError: If the rollouts do not fit, or only some of them carry recorded experts.
    """
    if max_documents is None and num_tokens is not None:
        max_documents = max(len(rollouts), default_max_documents(num_tokens))
    trained = [
        [False] * len(rollout.prompt_ids)
        + [mask and not (mask_truncated and rollout.truncated) for mask in rollout.trained_mask]
        for rollout in rollouts
    ]
    packed = pack_row(
        [
            Document([*rollout.prompt_ids, *rollout.completion_ids], mask)
            for rollout, mask in zip(rollouts, trained, strict=True)
        ],
        batch_tokens=num_tokens,
        max_documents=max_documents,
        pad_rows=num_tokens is not None,
        pad_token_id=pad_token_id,
    )
    size = packed.token_ids_T.numel()
    mask_T = torch.zeros(size, dtype=torch.bool)
    old_logprob_T = torch.zeros(size)
    advantage_T = torch.zeros(size)
    sequence_ids_T = torch.full((size,), len(rollouts) - 1, dtype=torch.int64)
    start = 0
    for index, (rollout, mask) in enumerate(zip(rollouts, trained, strict=True)):
        end = start + rollout.num_tokens
        # Position t predicts token t + 1: the completion's tokens are predicted one position earlier.
        first = start + len(rollout.prompt_ids) - 1
        on = torch.tensor(mask[len(rollout.prompt_ids) :])
        mask_T[first : end - 1] = on
        old_logprob_T[first : end - 1] = torch.where(on, torch.tensor(rollout.logprobs), 0.0)
        advantage_T[first : end - 1] = torch.where(on, rollout.advantage, 0.0)
        sequence_ids_T[start:end] = index
        start = end
    return RolloutBatch(packed, old_logprob_T, advantage_T, mask_T, sequence_ids_T, _replayed_experts(rollouts, size))


def _replayed_experts(rollouts: Sequence[Rollout], size: int) -> Tensor | None:
    recorded = [rollout.routed_experts for rollout in rollouts]
    if all(rows is None for rows in recorded):
        return None
    parts: list[Tensor] = []
    for rollout, rows in zip(rollouts, recorded, strict=True):
        if rows is None or rows.shape[0] != rollout.num_tokens - 1:
            seen = "none" if rows is None else str(rows.shape[0])
            raise UserError(
                f"routing replay: a rollout of {rollout.num_tokens} tokens has {seen} recorded rows, expected "
                f"{rollout.num_tokens - 1}; sample all rollouts of a batch with record_routing"
            )
        # The last token was never fed to the model and takes no loss: any experts do.
        parts.extend([rows, rows[-1:]])
    experts_TLK = torch.cat(parts).long()
    if experts_TLK.shape[0] < size:
        experts_TLK = torch.cat([experts_TLK, experts_TLK[-1:].expand(size - experts_TLK.shape[0], -1, -1)])
    return experts_TLK.permute(1, 0, 2).contiguous()
