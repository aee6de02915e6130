"""The base of every phase: builds or loads the model, its optimizer and its schedule, and counts what passes through.

A phase subclass writes ``training_step`` and ``evaluate``. Token losses are summed in each micro-step and divided by
the tokens of the whole optimizer step (all ranks, all accumulated micro-steps) just before it, so that rows with few
target tokens do not weigh like full ones.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from qwen3_kernels import dispatch
from torch import Tensor, nn

from qwen3_lit.data.batch import PackedBatch
from qwen3_lit.data.tokenizer import TextTokenizer, check_tokenizer_fits
from qwen3_lit.distributed.fsdp2_strategy import FSDP2Strategy, loss_scale
from qwen3_lit.distributed.gradients import NormWatch, clip_gradients, scale_gradients
from qwen3_lit.distributed.process_group import leave_at_exit
from qwen3_lit.distributed.rng import collect_rng_state, restore_rng_state
from qwen3_lit.errors import UserError
from qwen3_lit.losses.language_model import language_model_loss
from qwen3_lit.losses.load_balance import AuxFreeBias, BalanceStrategy, CombinedBalance, GlobalBatchBalance
from qwen3_lit.losses.reduction import sum_over_ranks
from qwen3_lit.losses.router_metrics import router_metrics
from qwen3_lit.model.config import ModelConfig, dimension_mismatches
from qwen3_lit.model.cost import training_flops
from qwen3_lit.model.hf_checkpoint import read_hf_config, save_hf
from qwen3_lit.model.moe import MoE
from qwen3_lit.model.transformer import ModelOutput
from qwen3_lit.modules.model_building import build_model
from qwen3_lit.optim.optimizer import build_optimizer
from qwen3_lit.optim.param_groups import OptimizerConfig
from qwen3_lit.optim.schedule import ScheduleConfig, check_length, learning_rate_multiplier

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """Work done by this rank since the phase began; callbacks turn it into rates."""

    tokens: int = 0
    """Tokens that went through forward and backward, padding left out."""
    flops: float = 0.0
    """Model FLOPs of those tokens, causal attention counted as it is."""
    rollout_tokens: int = 0
    """Tokens generated."""
    rollout_seconds: float = 0.0
    """Time spent generating and scoring."""


class PhaseModule(L.LightningModule):
    """One phase of the pipeline around one Qwen3 model."""

    def __init__(
        self,
        config: ModelConfig,
        init_from: str | None = None,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        balance: BalanceStrategy | None = None,
        z_loss_weight: float = 0.0,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        """
        Args:
            config: the model. With init_from its dimensions must be those of the folder; its position fields
                (rope_theta, rope_scaling, dual_chunk, max_position_embeddings) win over the folder's.
            init_from: Hugging Face folder whose weights start this phase; null starts from random weights.
            optimizer: learning rate, weight decay, clipping and parameter groups.
            schedule: learning rate over the phase.
            balance: load balance of the experts; null takes the global-batch loss. Ignored by dense models.
            z_loss_weight: weight of the squared logsumexp of the output logits.
            activation_checkpointing: recompute every block in the backward pass.
            compile_blocks: torch.compile every block.
        """
        super().__init__()
        self.config = config
        self.init_from = init_from
        self.optimizer_config = optimizer or OptimizerConfig()
        self.schedule_config = schedule or ScheduleConfig()
        self.balance = balance or GlobalBatchBalance()
        self.z_loss_weight = z_loss_weight
        self.activation_checkpointing = activation_checkpointing
        self.compile_blocks = compile_blocks
        self.counters = Counters()
        self.samples: list[dict[str, Any]] = []
        """The latest generated completions, for the sample table."""
        self.expert_load_LE: Tensor | None = None
        """Routed rows of each expert since a callback last cleared it."""
        self._norms = NormWatch()
        self._step_targets = 0.0
        self._micro_steps = 0
        if init_from is not None:
            self._check_dimensions(init_from)

    # ---- building

    def _check_dimensions(self, folder: str) -> None:
        mismatches = dimension_mismatches(self.config, read_hf_config(folder))
        if mismatches:
            raise UserError(
                f"model.init_args.config does not fit init_from={folder}: {'; '.join(mismatches)} (the folder's); "
                "stack the size overlay that this checkpoint was trained with"
            )

    def configure_model(self) -> None:
        """Build the model once, with the weights of ``init_from`` or random ones; the strategy may shard it."""
        if hasattr(self, "model"):
            return
        strategy = self._trainer.strategy if self._trainer is not None else None
        sharding = strategy if isinstance(strategy, FSDP2Strategy) else None
        self.model = build_model(self.config, self.init_from, sharding)
        self.model.activation_checkpointing = self.activation_checkpointing
        if self._uses_expert_bias():
            for module in self.model.modules():
                if isinstance(module, MoE):
                    module.gate.enable_expert_bias()
        heads = self.build_heads()
        if self.compile_blocks:
            self.model.compile_blocks(fullgraph=torch.cuda.is_available())
        if sharding is not None:
            for head in heads:
                sharding.shard_head(head)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type in which the trainer runs the model; frozen models beside it are loaded in it."""
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            return self.trainer.strategy.param_dtype
        with self.trainer.precision_plugin.forward_context():
            return dispatch.autocast(torch.empty(0, device=self.device)).dtype

    def build_heads(self) -> list[nn.Module]:
        """Add what a phase trains beside the model, which has its weights, and return it for sharding."""
        return []

    def _uses_expert_bias(self) -> bool:
        parts = self.balance.parts if isinstance(self.balance, CombinedBalance) else [self.balance]
        return any(isinstance(part, AuxFreeBias) for part in parts)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over all trainable parameters and a scheduler stepped with it."""
        total_steps = self.schedule_steps()
        check_length(self.schedule_config, total_steps)
        optimizer = build_optimizer(self, self.optimizer_config)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_multiplier(step, self.schedule_config, total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def schedule_steps(self) -> int | None:
        """Optimizer steps of the phase, None when the trainer has no end."""
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if steps != float("inf") else None

    # ---- what the phases call

    @property
    def tokenizer(self) -> TextTokenizer:
        """The data module's tokenizer."""
        return self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]

    @property
    def valid_vocab(self) -> int:
        """Rows of the head that are real tokens."""
        return len(self.tokenizer)

    def setup(self, stage: str) -> None:
        """Refuse a tokenizer that does not fit the model before anything runs."""
        if torch.distributed.is_initialized():
            leave_at_exit()
        check_tokenizer_fits(self.tokenizer, self.config.vocab_size, self.init_from)

    def run_model(self, batch: PackedBatch, **options: Any) -> ModelOutput:
        """Forward a packed row and count it."""
        output = self.model(
            batch.token_ids_T,
            batch.position_ids_T,
            batch.cu_seqlens,
            batch.max_seqlen,
            token_mask_T=batch.token_mask_T,
            **options,
        )
        if self.training:
            self.counters.tokens += batch.num_tokens
            self.counters.flops += training_flops(self.config, [b - a for a, b in batch.document_spans()])
            if output.routing is not None:
                counts_LE = output.routing.counts_LE.detach()
                self.expert_load_LE = counts_LE if self.expert_load_LE is None else self.expert_load_LE + counts_LE
        return output

    def language_model_step(self, batch: PackedBatch) -> Tensor:
        """Loss of one micro-step of next-token prediction, to be returned from ``training_step``.

        Sums are divided by the fixed row length and rescaled to the mean over target tokens by
        ``on_before_optimizer_step``; the balance loss of a micro-step weighs by its target tokens on all ranks.
        """
        output = self.run_model(batch)
        result = language_model_loss(
            output.hidden_TD,
            self.model.lm_head_weight,
            batch.target_ids_T,
            num_tokens_total=1.0,
            loss_weights_T=batch.loss_weights_T,
            z_loss_weight=self.z_loss_weight,
            valid_vocab=self.valid_vocab,
        )
        return self.micro_step_loss(result.loss, batch.num_loss_tokens, output, {"loss": result.nll_sum})

    def micro_step_loss(
        self, loss_sum: Tensor, num_targets: int, output: ModelOutput, shown: dict[str, Tensor]
    ) -> Tensor:
        """What ``training_step`` returns for a loss summed over this rank's targets, the balance loss added.

        Args:
            loss_sum: 0-d, summed over the targets and not divided.
            num_targets: what the mean of the step is taken over: target tokens, or pairs.
            output: of the forward pass, whose routing is balanced.
            shown: sums over the targets, logged as ``train/<name>`` divided by the targets of all ranks.
        """
        targets = torch.full((), float(num_targets), device=self.device)
        *sums, targets = sum_over_ranks(torch.stack([*(value.float() for value in shown.values()), targets]))
        for name, value in zip(shown, sums, strict=True):
            self.log(f"train/{name}", value / targets.clamp(min=1), prog_bar=True, batch_size=max(1, num_targets))
        if output.routing is not None:
            # A rank's balance loss is its share of the micro-step's: weighed by its own targets alone, the shares would
            # add up to their mean over ranks, 1/ranks of the whole.
            loss_sum = loss_sum + targets * self.balance.loss(output.routing)
            self.log_router(output)
        self._step_targets += num_targets
        self._micro_steps += 1
        return loss_sum / self._row_tokens

    def held_out_nll(self, batch: PackedBatch) -> tuple[Tensor, int]:
        """Summed nats over a row's targets, and how many there are."""
        batch = batch.to(self.device)
        hidden_TD = self.run_model(batch).hidden_TD
        result = language_model_loss(
            hidden_TD, self.model.lm_head_weight, batch.target_ids_T, num_tokens_total=1.0, valid_vocab=self.valid_vocab
        )
        return result.nll_sum, batch.num_loss_tokens

    def log_held_out_loss(self, batch: PackedBatch) -> None:
        """``val/loss`` of a row, weighed by its targets."""
        nll, tokens = self.held_out_nll(batch)
        self.log("val/loss", nll / max(1, tokens), batch_size=max(1, tokens), sync_dist=True, prog_bar=True)

    @property
    def _row_tokens(self) -> int:
        return self.trainer.datamodule.batch_tokens  # type: ignore[attr-defined]

    def log_router(self, output: ModelOutput) -> None:
        """Router health of this micro-step, means over layers."""
        routing = output.routing
        assert routing is not None
        metrics = router_metrics(routing.counts_LE, routing.prob_sum_LE, routing.z_sum_L, routing.num_tokens)
        self.log_dict({f"router/{name}": value for name, value in metrics.items()})

    # ---- manual optimization

    def begin_optimizer_step(self) -> LightningOptimizer:
        """The optimizer, gradients cleared."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        return optimizer

    def end_optimizer_step(self, optimizer: LightningOptimizer) -> None:
        """Clip, step, move the learning rate on, and let the balance strategy forget the step.

        Raises:
            UserError: the gradient norm is not finite; the weights are as before.
        """
        self.clip_gradients_and_log(optimizer)
        # Beside a rollout a wait for the device costs nothing, and the next rollout needs weights that are numbers.
        self._norms.require_finite()
        optimizer.step()
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        scheduler.step()
        self.balance.after_optimizer_step(self.model)

    # ---- hooks of automatic optimization

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the summed gradient into the mean over the targets of the whole step."""
        if not self.automatic_optimization or self._micro_steps == 0:
            return
        targets = sum_over_ranks(torch.tensor(self._step_targets, device=self.device)).clamp(min=1)
        # Lightning divided by the accumulated micro-steps and some strategies average over ranks: both are undone.
        ranks = loss_scale(self.trainer.strategy, self.trainer.world_size)
        scale = self._row_tokens * self.trainer.accumulate_grad_batches * ranks / targets
        scale_gradients((p for group in optimizer.param_groups for p in group["params"]), scale)
        self._step_targets, self._micro_steps = 0.0, 0

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Clip by the global norm that OptimizerConfig names, and log it."""
        self.clip_gradients_and_log(optimizer)

    def clip_gradients_and_log(self, optimizer: torch.optim.Optimizer | LightningOptimizer) -> None:
        """Clip by the norm over all parameters and meshes; the norm before clipping is logged."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        norm = clip_gradients(parameters, self.optimizer_config.grad_clip_norm)
        self._norms.see(norm, self.trainer.global_step + 1)
        self.log("train/grad_norm", norm)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Balance strategies forget the finished step here, before any callback can save a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        if self.automatic_optimization:
            self.balance.after_optimizer_step(self.model)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop behind a gradient that was not finite, at the steps at which the trainer waits for the device anyway."""
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._norms.require_finite()

    def on_train_epoch_end(self) -> None:
        """Stop before the callbacks evaluate and export what is no model any more."""
        self._norms.require_finite()

    # ---- evaluation and hand-over

    def evaluate(self) -> dict[str, float]:
        """Figures of the model as it stands, on held-out data; called before and after the phase."""
        raise NotImplementedError

    def test_step(self, batch: int, batch_idx: int) -> None:
        """Log ``evaluate()`` of the weights as they are, which reads its data itself."""
        figures = {f"test/{name}": float(value) for name, value in self.evaluate().items()}
        self.log_dict(figures, batch_size=1, sync_dist=True)

    def report_metrics(self, before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
        """What the stage table shows of this phase; by default every figure before and after."""
        return {f"{k}_before": v for k, v in before.items()} | {f"{k}_after": v for k, v in after.items()}

    def export(self, folder: str | Path) -> None:
        """Write the Hugging Face folder that the next phase (and transformers, and vLLM) loads."""
        self._norms.require_finite()
        save_hf(self.model, self.model.config, str(folder), tokenizer_dir=self.tokenizer.path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Random states and balance counts: a resumed run draws and balances like one never stopped.

        Raises:
            UserError: a gradient norm was not finite, so that these weights must not replace the last good ones.
        """
        self._norms.require_finite()
        checkpoint["phase"] = {
            "balance": self.balance.state_dict(),
            "step_targets": (self._step_targets, self._micro_steps),
            "counters": vars(self.counters).copy(),
            "config": asdict(self.config),
            "rng": collect_rng_state(),
            **self.phase_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what ``on_save_checkpoint`` wrote."""
        state = checkpoint["phase"]
        self.balance.load_state_dict(state["balance"])
        self._step_targets, self._micro_steps = state["step_targets"]
        self.counters = Counters(**state["counters"])
        restore_rng_state(state["rng"])
        self.load_phase_state(state)

    def phase_state(self) -> dict[str, Any]:
        """More state of a subclass, for the checkpoint."""
        return {}

    def load_phase_state(self, state: dict[str, Any]) -> None:
        """Restore ``phase_state``."""
