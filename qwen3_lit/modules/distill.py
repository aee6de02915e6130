"""Strong-to-weak distillation, both phases (Technical Report, section 4.5).

What the batch holds decides. Packed conversations are teacher outputs: the student imitates them (off-policy). Prompts
are answered by the student itself, and every token it sampled is pulled towards the teacher's whole distribution by a
Kullback-Leibler divergence (on-policy). The report names neither direction nor temperature of that divergence: the
default, reverse KL at temperature 1, is ours.
"""

import time
from typing import Any

import torch
from torch import Tensor

from qwen3_lit.data.batch import PackedBatch, PromptBatch
from qwen3_lit.data.tokenizer import check_tokenizer_fits
from qwen3_lit.distributed.fsdp2_strategy import loss_scale
from qwen3_lit.errors import UserError
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.losses.distillation import distillation_loss
from qwen3_lit.losses.reduction import sum_over_ranks
from qwen3_lit.model.hf_checkpoint import HfWeights, load_hf
from qwen3_lit.model.transformer import Qwen3
from qwen3_lit.modules.cold_start_sft import ColdStartSFTModule
from qwen3_lit.modules.grpo import seconds_per_point
from qwen3_lit.modules.policy_module import pack_for_ranks, training_params
from qwen3_lit.rl.rollout import collect


class DistillModule(ColdStartSFTModule):
    """A student that learns from teacher outputs, then from the teacher's probabilities on its own outputs."""

    _teacher: Qwen3 | None

    def __init__(
        self,
        on_policy: bool = False,
        teacher: str | None = None,
        sampling: SamplingParams | None = None,
        samples_per_prompt: int = 1,
        jsd_beta: float = 1.0,
        micro_batch_tokens: int = 32768,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            on_policy: whether the data are prompts that the student answers, or teacher outputs.
            teacher: Hugging Face folder of the teacher, same tokenizer; needed on-policy.
            sampling: how the student's completions are drawn; the full distribution, its n is samples_per_prompt.
            samples_per_prompt: completions of one prompt.
            jsd_beta: 0 is forward KL(teacher || student), 1 reverse KL, between them the generalised Jensen-Shannon
                divergence.
            micro_batch_tokens: most tokens of one on-policy forward and backward pass.
            kwargs: see PolicyModule and PhaseModule.
        """
        super().__init__(**kwargs)
        self.automatic_optimization = not on_policy
        self.sampling = training_params(sampling or SamplingParams(), samples_per_prompt, record_routing=False)
        self.jsd_beta = jsd_beta
        self.micro_batch_tokens = micro_batch_tokens
        self.teacher_folder = teacher
        self._groups_sampled = 0
        self.__dict__["_teacher"] = None  # outside of parameters(), optimizer and checkpoint
        if on_policy and teacher is None:
            raise UserError("model.init_args.teacher is null: on-policy distillation needs the teacher's folder")

    def setup(self, stage: str) -> None:
        """Refuse a teacher that is no whole folder or whose token ids are not the student's, and lengths that fit into
        no micro-batch."""
        super().setup(stage)
        if not self.automatic_optimization and self.teacher_folder is not None:
            vocab_size = HfWeights(self.teacher_folder).config.vocab_size
            check_tokenizer_fits(self.tokenizer, vocab_size, self.teacher_folder)
            self.check_rollouts_fit(self.sampling.max_new_tokens, self.micro_batch_tokens)

    @property
    def teacher(self) -> Qwen3:
        """The frozen teacher, loaded on first use."""
        if self._teacher is None:
            assert self.teacher_folder is not None
            teacher = load_hf(self.teacher_folder, dtype=self.compute_dtype)
            self.__dict__["_teacher"] = teacher.to(self.device).eval().requires_grad_(False)
        assert self._teacher is not None
        return self._teacher

    def training_step(self, batch: PackedBatch | PromptBatch, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        """Imitate, or sample and match."""
        if isinstance(batch, PromptBatch) == self.automatic_optimization:
            raise UserError(
                f"model.init_args.on_policy is {not self.automatic_optimization}, but the data give "
                f"{type(batch).__name__}; on-policy goes with PromptData, off-policy with ConversationData"
            )
        if isinstance(batch, PackedBatch):
            return self.language_model_step(batch)
        self._on_policy_step(batch)
        return None

    def _on_policy_step(self, batch: PromptBatch) -> None:
        started = time.perf_counter()
        with self.generating() as engine:
            rollouts = collect(
                engine,
                self.tokenizer,
                batch.problems,
                self.sampling,
                self.environments,
                policy_version=self.global_step,
                first_group_id=self._groups_sampled,
            )
        self._groups_sampled += len(batch)
        self.counters.rollout_tokens += sum(len(r.completion_ids) for r in rollouts)
        self.counters.rollout_seconds += time.perf_counter() - started
        # A cut completion is as good a place to learn the teacher's distribution as any other.
        rows = pack_for_ranks(rollouts, self.micro_batch_tokens, mask_truncated=False, device=self.device)
        local = torch.tensor(float(sum(row.num_trained_tokens for row in rows)), device=self.device)
        tokens = sum_over_ranks(local).clamp(min=1)
        optimizer = self.begin_optimizer_step()
        scale = loss_scale(self.trainer.strategy, self.trainer.world_size)
        total = torch.zeros((), device=self.device)
        for index, row in enumerate(rows):
            row = row.to(self.device)
            packed = row.packed
            inputs = (packed.token_ids_T, packed.position_ids_T, packed.cu_seqlens, packed.max_seqlen)
            with torch.no_grad():
                teacher_hidden_TD = self.teacher(*inputs).hidden_TD
            output = self.run_model(packed)
            result = distillation_loss(
                output.hidden_TD,
                self.model.lm_head_weight,
                teacher_hidden_TD,
                self.teacher.lm_head_weight,
                packed.target_ids_T,
                row.mask_T,
                num_tokens_total=tokens,
                jsd_beta=self.jsd_beta,
                temperature=self.sampling.temperature,
                valid_vocab=self.valid_vocab,
            )
            loss = result.loss
            if output.routing is not None:
                loss = loss + self.balance.loss(output.routing) / len(rows)
            with self.gradient_sync(index == len(rows) - 1):
                self.manual_backward(loss * scale)
            total = total + result.divergence_sum
        self.end_optimizer_step(optimizer)
        self.log("train/divergence", sum_over_ranks(total) / tokens, prog_bar=True)
        lengths = [float(len(r.completion_ids)) for r in rollouts]
        sampled, count = sum_over_ranks(torch.tensor([sum(lengths), len(lengths)], device=self.device)).tolist()
        self.log("rollout/completion_tokens", sampled / count)
        self.samples = [
            {
                "step": self.global_step,
                "task": r.problem.get("task", ""),
                "mode": r.mode,
                "prompt": r.problem["messages"][-1]["content"],
                "completion": r.text,
                "reference": r.problem.get("answer"),
            }
            for r in rollouts[:4]
        ]

    def report_metrics(self, before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
        """Off-policy: the figures after. On-policy: before and after, and seconds for each point of accuracy."""
        if self.automatic_optimization:
            return after
        figures = {f"{k}_before": v for k, v in before.items()} | {f"{k}_after": v for k, v in after.items()}
        return figures | seconds_per_point(before, after, seconds)

    def phase_state(self) -> dict[str, Any]:
        """Engine stream and group counter."""
        return super().phase_state() | {"groups_sampled": self._groups_sampled}

    def load_phase_state(self, state: dict[str, Any]) -> None:
        """Restore ``phase_state``."""
        super().load_phase_state(state)
        self._groups_sampled = state["groups_sampled"]
