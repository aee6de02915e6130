"""Group relative policy optimisation: rollout, reward, advantage, policy loss (Technical Report, sections 4.2 and 4.4).

One ``training_step`` is one step of reinforcement learning: sample a group for every prompt with the weights as they
are, score it, centre the rewards in each group, and take ``num_minibatches`` optimizer steps on it. GRPO: arXiv
2402.03300; token normalisation, clip-higher, dynamic sampling and the mask on truncated completions: DAPO, arXiv
2503.14476.
"""

import logging
import time
from typing import Any

import torch
from qwen3_kernels import linear_logprob
from torch import Tensor

from qwen3_lit.data.batch import PromptBatch
from qwen3_lit.distributed.fsdp2_strategy import loss_scale
from qwen3_lit.errors import UserError
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.losses.policy_gradient import GRPOLoss, PolicyInputs, PolicyLoss
from qwen3_lit.losses.reduction import gather_over_ranks, max_over_ranks, sum_over_ranks
from qwen3_lit.model.hf_checkpoint import load_hf
from qwen3_lit.model.transformer import Qwen3
from qwen3_lit.modules.model_building import position_fields
from qwen3_lit.modules.policy_module import PolicyModule, pack_for_ranks, training_params
from qwen3_lit.rl.advantage import AdvantageEstimator, GroupRelativeAdvantage
from qwen3_lit.rl.dynamic_sampling import DynamicSamplingConfig, decide_refill
from qwen3_lit.rl.replay import split_minibatches
from qwen3_lit.rl.rewards.reward import check_rewards
from qwen3_lit.rl.rollout import Rollout, RolloutBatch, collect, score_rollouts
from qwen3_lit.rl.rollout_metrics import alarms, rollout_metrics

log = logging.getLogger(__name__)


class GRPOModule(PolicyModule):
    """Reinforcement learning from verifiable and model-based rewards."""

    reference: Qwen3 | None

    def __init__(
        self,
        sampling: SamplingParams | None = None,
        group_size: int = 16,
        policy_loss: PolicyLoss | None = None,
        advantage: AdvantageEstimator | None = None,
        dynamic_sampling: DynamicSamplingConfig | None = None,
        num_minibatches: int = 1,
        micro_batch_tokens: int = 32768,
        mask_truncated: bool = True,
        routing_replay: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            sampling: how training completions are drawn; the full distribution, its n is group_size.
            group_size: completions of one prompt, at least 2.
            policy_loss: null takes GRPOLoss with DAPO's settings.
            advantage: null takes the group-relative one, divided by the group's standard deviation.
            dynamic_sampling: replacing of groups without signal.
            num_minibatches: optimizer steps on one batch of rollouts; more than one is off-policy.
            micro_batch_tokens: most tokens of one forward and backward pass.
            mask_truncated: leave completions that were cut out of the loss.
            routing_replay: train on the experts that the engine chose (R3, arXiv 2510.11370); dense models ignore it.
            kwargs: see PolicyModule and PhaseModule.
        """
        super().__init__(**kwargs)
        self.automatic_optimization = False
        if group_size < 2:
            raise UserError(f"model.init_args.group_size: seen {group_size}, expected at least 2 completions a prompt")
        if num_minibatches < 1:
            raise UserError(f"model.init_args.num_minibatches: seen {num_minibatches}, expected at least 1")
        self.group_size = group_size
        self.routing_replay = routing_replay and self.config.num_moe_layers > 0
        self.sampling = training_params(sampling or SamplingParams(), group_size, self.routing_replay)
        self.policy_loss = policy_loss or GRPOLoss()
        self.advantage = advantage or GroupRelativeAdvantage()
        self.dynamic_sampling = dynamic_sampling or DynamicSamplingConfig()
        self.num_minibatches = num_minibatches
        self.micro_batch_tokens = micro_batch_tokens
        self.mask_truncated = mask_truncated
        self._groups_sampled = 0
        self._said: set[str] = set()
        self.__dict__["reference"] = None  # outside of parameters(), optimizer and checkpoint

    def setup(self, stage: str) -> None:
        """Refuse problems that no reward judges, and lengths that fit into no micro-batch, before sampling."""
        super().setup(stage)
        self.check_rollouts_fit(self.sampling.max_new_tokens, self.micro_batch_tokens)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        data.ensure_loaded()
        check_rewards(self.rewards, data.problems, data.known_tasks)

    # ---- the four steps

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Rollout -> reward -> advantage -> policy loss."""
        started = time.perf_counter()
        rollouts = self.sample_and_score(batch)
        self.counters.rollout_seconds += time.perf_counter() - started
        self.advantage(rollouts, self.group_size)
        self.log_rollouts(rollouts)
        self.learn(rollouts)

    def sample_and_score(self, batch: PromptBatch) -> list[Rollout]:
        """Groups with signal for as many prompts as the batch has, as far as the refills reach."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        rollouts: list[Rollout] = []
        problems, used, refills = list(batch.problems), set(batch.indices), 0
        self._reward_totals = self.pool.totals.copy()
        # Gathered once around all rounds: how many of them there are is each rank's own affair.
        with self.generating() as engine:
            while True:
                fresh = collect(
                    engine,
                    self.tokenizer,
                    problems,
                    self.sampling,
                    self.environments,
                    policy_version=self.global_step,
                    first_group_id=self._groups_sampled,
                )
                self._groups_sampled += len(problems)
                score_rollouts(fresh, self.pool)
                rollouts += fresh
                self.counters.rollout_tokens += sum(len(r.completion_ids) for r in fresh)
                if refills == 0:
                    self._first_sampled = fresh
                decision = decide_refill(rollouts, len(batch), refills, self.dynamic_sampling)
                if not decision.num_prompts_wanted:
                    return decision.keep(rollouts)
                more = data.refill(batch.batch_index, refills, decision.num_prompts_wanted, exclude=used)
                if not len(more):
                    # No spare problem is left: as when the refills are used up, groups without signal fill the step.
                    refills = self.dynamic_sampling.max_refills
                    return decide_refill(rollouts, len(batch), refills, self.dynamic_sampling).keep(rollouts)
                problems, used, refills = more.problems, used | set(more.indices), refills + 1

    def learn(self, rollouts: list[Rollout]) -> None:
        """``num_minibatches`` optimizer steps on scored rollouts."""
        count = min(self.num_minibatches, len(rollouts))
        minibatches = split_minibatches(rollouts, count, seed=self.global_step)
        options: dict[str, Any] = {"mask_truncated": self.mask_truncated, "device": self.device}
        packed = [pack_for_ranks(minibatch, self.micro_batch_tokens, **options) for minibatch in minibatches]
        # With one step the weights being trained are those that sampled: the ratio is one by definition.
        old: list[list[Tensor | None]] = [[None] * len(rows) for rows in packed]
        if count > 1:
            old = [[self._score(row, self.model)[0] for row in rows] for rows in packed]
        for rows, old_rows in zip(packed, old, strict=True):
            self._optimizer_step(rows, old_rows)

    def _optimizer_step(self, rows: list[RolloutBatch], old_rows: list[Tensor | None]) -> None:
        counts = torch.tensor(
            [sum(row.num_trained_tokens for row in rows), sum(row.num_sequences for row in rows)],
            dtype=torch.float64,
            device=self.device,
        )
        trained_tokens, trained_sequences = sum_over_ranks(counts).tolist()
        tokens, sequences = max(1.0, trained_tokens), max(1.0, trained_sequences)
        optimizer = self.begin_optimizer_step()
        scale = loss_scale(self.trainer.strategy, self.trainer.world_size)
        metrics: dict[str, Tensor] = {}
        for index, (row, old_T) in enumerate(zip(rows, old_rows, strict=True)):
            row = row.to(self.device)
            output = self.run_model(row.packed, replay_expert_ids_LTK=row.replay_expert_ids_LTK)
            targets_T = row.packed.target_ids_T.clamp(min=0)
            scored = linear_logprob(
                output.hidden_TD,
                self.model.lm_head_weight,
                targets_T,
                temperature=self.sampling.temperature,
                valid_vocab=self.valid_vocab,
            )
            result = self.policy_loss(
                PolicyInputs(
                    logprob_T=scored.logprob_T,
                    old_logprob_T=scored.logprob_T.detach() if old_T is None else old_T,
                    advantage_T=row.advantage_T,
                    mask_T=row.mask_T,
                    sequence_ids_T=row.sequence_ids_T,
                    num_tokens_total=tokens,
                    num_sequences_total=sequences,
                    sampler_logprob_T=row.old_logprob_T,
                    ref_logprob_T=self._reference_logprob(row),
                    entropy_T=scored.entropy_T,
                )
            )
            loss = result.loss
            if output.routing is not None:
                loss = loss + self.balance.loss(output.routing) / len(rows)
            with self.gradient_sync(index == len(rows) - 1):
                self.manual_backward(loss * scale)
            for name, value in result.metrics.items():
                summed = metrics.get(name, torch.zeros_like(value))
                metrics[name] = torch.maximum(summed, value) if name.endswith("_max") else summed + value
        self.end_optimizer_step(optimizer)
        metrics = {k: max_over_ranks(v) if k.endswith("_max") else sum_over_ranks(v) for k, v in metrics.items()}
        if "entropy" in metrics and trained_tokens:  # no token has no entropy, which is not an entropy of zero
            self.policy_loss.entropy_bonus.update(metrics["entropy"].item())
        self.log_dict({f"policy/{name}": value for name, value in metrics.items()})

    @torch.no_grad()
    def _score(self, row: RolloutBatch, model: Qwen3) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the targets under ``model``."""
        row = row.to(self.device)
        packed = row.packed
        replay = row.replay_expert_ids_LTK if model is self.model else None
        hidden_TD = model(
            packed.token_ids_T,
            packed.position_ids_T,
            packed.cu_seqlens,
            packed.max_seqlen,
            token_mask_T=packed.token_mask_T,
            replay_expert_ids_LTK=replay,
        ).hidden_TD
        scored = linear_logprob(
            hidden_TD,
            model.lm_head_weight,
            packed.target_ids_T.clamp(min=0),
            temperature=self.sampling.temperature,
            valid_vocab=self.valid_vocab,
        )
        return scored.logprob_T, scored.entropy_T

    def _reference_logprob(self, row: RolloutBatch) -> Tensor | None:
        if not self.policy_loss.needs_reference:
            return None
        if self.reference is None:
            if self.init_from is None:
                raise UserError("policy_loss.beta > 0 needs init_from: the reference is the model a phase starts from")
            reference = load_hf(self.init_from, dtype=self.compute_dtype, overrides=position_fields(self.config))
            self.__dict__["reference"] = reference.to(self.device).eval().requires_grad_(False)
        assert self.reference is not None
        return self._score(row, self.reference)[0]

    # ---- what is shown

    def log_rollouts(self, rollouts: list[Rollout]) -> None:
        """Reward and length figures of what was sampled (before groups were dropped), alarms, and a few completions."""
        failures = self.pool.metrics_since(self._reward_totals)  # of all refills
        metrics = rollout_metrics(self._first_sampled)
        groups, pools = zip(*gather_over_ranks((len({r.group_id for r in rollouts}), failures)), strict=True)
        metrics["groups_trained"] = float(sum(groups))
        workers = {
            name: sum(pool.get(name, 0.0) for pool in pools) / (len(pools) if name.endswith("_frac") else 1)
            for name in sorted({name for pool in pools for name in pool})
        }
        for line in alarms(metrics | workers):
            if line.split(":")[-1] not in self._said:
                self._said.add(line.split(":")[-1])
                log.warning(line)
        metrics |= {f"workers/{name}": value for name, value in workers.items()}
        self.log_dict({f"rollout/{name}": value for name, value in metrics.items()})
        self.log("reward", metrics["reward/mean"], prog_bar=True)
        self.samples = [
            {
                "step": self.global_step,
                "task": r.problem.get("task", ""),
                "mode": r.mode,
                "prompt": r.problem["messages"][-1]["content"],
                "completion": r.text,
                "reference": r.problem.get("answer"),
                "rewards": r.rewards,
                "reward": r.reward,
                "advantage": r.advantage,
            }
            for r in rollouts[:: max(1, len(rollouts) // 4)][:4]
        ]

    def report_metrics(self, before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
        """Every figure before and after; seconds of the phase for each point of accuracy gained."""
        figures = super().report_metrics(before, after, seconds)
        if "think_follow" in after:
            figures["think_follow"] = after["think_follow"]
        return figures | seconds_per_point(before, after, seconds)

    def phase_state(self) -> dict[str, Any]:
        """Engine stream, group counter and the adaptive entropy coefficient."""
        return super().phase_state() | {
            "groups_sampled": self._groups_sampled,
            "entropy_bonus": self.policy_loss.entropy_bonus.state_dict(),
        }

    def load_phase_state(self, state: dict[str, Any]) -> None:
        """Restore ``phase_state``."""
        super().load_phase_state(state)
        self._groups_sampled = state["groups_sampled"]
        self.policy_loss.entropy_bonus.load_state_dict(state["entropy_bonus"])


def seconds_per_point(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
    """Seconds of training for each percentage point of held-out accuracy; absent when accuracy did not rise."""
    if "accuracy" not in before or after["accuracy"] <= before["accuracy"]:
        return {}
    return {"seconds_per_point": seconds / (100 * (after["accuracy"] - before["accuracy"]))}
