"""Phases that sample: what a step trains on, and settings that cannot work refused before anything is sampled."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from qwen3_lit.data.prompt_data import PromptData
from qwen3_lit.errors import UserError
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.losses.entropy_bonus import AdaptiveEntropyBonus
from qwen3_lit.losses.policy_gradient import GRPOLoss
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.hf_checkpoint import save_hf
from qwen3_lit.model.transformer import Qwen3
from qwen3_lit.modules.distill import DistillModule
from qwen3_lit.modules.grpo import GRPOModule
from qwen3_lit.modules.policy_module import EngineConfig, EvaluationConfig
from qwen3_lit.rl.rewards.reward import Reward, RewardInput
from qwen3_lit.rl.rollout import Rollout

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_experts=8,
    num_experts_per_tok=2,
)


class ByProblem(Reward):
    """Every second completion of a problem whose answer is 1 is right; no other is."""

    in_process = True

    def score_batch(self, items: Sequence[RewardInput]) -> list[float | None]:
        return [float(item.reference == "1" and index % 2 == 0) for index, item in enumerate(items)]


class Recording(GRPOModule):
    """Keeps what is trained on, and what is logged."""

    def learn(self, rollouts: list[Rollout]) -> None:
        self.trained = rollouts
        super().learn(rollouts)

    def log(self, name: str, value: Any, **options: Any) -> None:
        self.__dict__.setdefault("logged", {})[name] = float(value)
        super().log(name, value, **options)


def problems(folder: Path, tokenizer: str, answers: Sequence[str], **options: Any) -> PromptData:
    file = folder / "problems.jsonl"
    records = [{"prompt": f"the cat {n}", "answer": answer, "task": "cats"} for n, answer in enumerate(answers)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return PromptData(tokenizer, [str(file)], **{"prompts_per_step": 2, **options})


def policy(kind: type[Recording] = Recording, **options: Any) -> Any:
    defaults = {
        "config": CONFIG,
        "rewards": [ByProblem()],
        "sampling": SamplingParams(max_new_tokens=4),
        "group_size": 2,
        "micro_batch_tokens": 256,
        "mask_truncated": False,
        "engine": EngineConfig(max_batch_size=8, max_cached_tokens=4096),
    }
    return kind(**{**defaults, **options})


def fit(module: L.LightningModule, data: PromptData, folder: Path, **options: Any) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"max_steps": 1, **options},
    )
    trainer.fit(module, data)


@pytest.mark.parametrize("answers", [["0", "0"], ["1", "0"], ["1", "0", "0"]])
def test_groups_without_signal_fill_the_step_when_no_spare_problem_is_left(
    answers: list[str], tmp_path: Path, tokenizer_folder: str
) -> None:
    module = policy()
    fit(module, problems(tmp_path, tokenizer_folder, answers), tmp_path)
    assert len(module.trained) == 4 and len({rollout.group_id for rollout in module.trained}) == 2


class BrokenAtFirst(ByProblem):
    """No score is a number in the first batch; later batches are without fault."""

    calls = 0

    def score_batch(self, items: Sequence[RewardInput]) -> list[float | None]:
        self.calls += 1
        return [float("nan")] * len(items) if self.calls == 1 else super().score_batch(items)


def test_failed_rewards_of_a_step_are_logged_and_warned_of_although_refills_follow(
    tmp_path: Path, tokenizer_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = policy(rewards=[BrokenAtFirst()])
    fit(module, problems(tmp_path, tokenizer_folder, ["1"] * 4), tmp_path)
    assert module.pool.rewards[0].calls == 2, "one refill"
    assert module.trainer.callback_metrics["rollout/workers/errors"] == 4
    assert module.trainer.callback_metrics["rollout/workers/error_frac"] == 0.5
    assert "50.0% of rewards raise or are no number" in caplog.text and "(reward)" in caplog.text


@pytest.mark.parametrize("on_policy_distillation", [False, True])
def test_completions_that_no_micro_batch_can_hold_are_refused_before_anything_is_sampled(
    on_policy_distillation: bool, tmp_path: Path, tokenizer_folder: str
) -> None:
    data = problems(tmp_path, tokenizer_folder, ["1", "1"], max_prompt_tokens=61)
    module: L.LightningModule = policy(micro_batch_tokens=64)
    if on_policy_distillation:
        save_hf(Qwen3(CONFIG), CONFIG, tmp_path / "teacher", tokenizer_dir=tokenizer_folder)
        options = {"teacher": str(tmp_path / "teacher"), "sampling": SamplingParams(max_new_tokens=4)}
        module = DistillModule(config=CONFIG, on_policy=True, micro_batch_tokens=64, **options)
    with pytest.raises(UserError, match="micro_batch_tokens: seen 64, expected at least 65, .*max_prompt_tokens 61"):
        fit(module, data, tmp_path)


class Evaluating(Recording):
    """Keeps the results of the evaluation before the step."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self.results = self.answer_held_out()


def test_each_mode_is_evaluated_with_its_own_sampling(tmp_path: Path, tokenizer_folder: str) -> None:
    data = problems(tmp_path, tokenizer_folder, ["1", "1"])
    evaluation = {"problems": [str(tmp_path / "problems.jsonl")], "sampling": SamplingParams(max_new_tokens=5)}
    options: dict[str, Any] = {**evaluation, "modes": ["think", "no_think"]}
    options["sampling_no_think"] = SamplingParams(max_new_tokens=3)
    module = policy(kind=Evaluating, evaluation=EvaluationConfig(**options))
    fit(module, data, tmp_path)
    most = {mode: max(s["tokens"] for s in result.samples) for mode, result in module.results.items()}
    assert most == {"think": 5, "no_think": 3}
    with pytest.raises(UserError, match="sampling_no_think is set, but modes"):
        policy(evaluation=EvaluationConfig(**{**options, "modes": ["think"]}))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_frozen_models_are_held_in_the_type_that_the_trainer_computes_in(
    precision: str, dtype: torch.dtype, tmp_path: Path, tokenizer_folder: str
) -> None:
    start = str(tmp_path / "start")
    save_hf(Qwen3(CONFIG), CONFIG, start, tokenizer_dir=tokenizer_folder)
    data = problems(tmp_path, tokenizer_folder, ["1", "1"])
    moved = replace(CONFIG, rope_theta=123.0)
    module = policy(config=moved, init_from=start, policy_loss=GRPOLoss(beta=0.1))
    fit(module, data, tmp_path, precision=precision)
    assert module.reference is not None
    assert {p.dtype for p in module.reference.parameters()} == {dtype}
    assert module.reference.config.rope_theta == 123.0, "the reference is the model that the phase starts from"
    assert {p.dtype for p in module.model.parameters()} == {torch.float32}
    student = DistillModule(config=CONFIG, on_policy=True, teacher=start, sampling=SamplingParams(max_new_tokens=4))
    fit(student, data, tmp_path, precision=precision)
    assert {p.dtype for p in student.teacher.parameters()} == {dtype}


def test_a_step_that_trains_no_token_leaves_the_entropy_coefficient_alone(
    tmp_path: Path, tokenizer_folder: str
) -> None:
    bonus = AdaptiveEntropyBonus(target=0.2, step=0.005)
    loss = GRPOLoss(entropy_bonus=bonus)
    module = policy(policy_loss=loss, mask_truncated=True, sampling=SamplingParams(max_new_tokens=1))
    fit(module, problems(tmp_path, tokenizer_folder, ["1", "1"]), tmp_path)
    assert all(rollout.truncated for rollout in module.trained)
    assert bonus.state_dict() == AdaptiveEntropyBonus(target=0.2, step=0.005).state_dict()
