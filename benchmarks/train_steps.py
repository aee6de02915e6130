"""A training step of the first layers of Qwen3-30B-A3B by each contender: forward and backward, gradients made anew.

A contender is built from the configuration, a batch and the device, and gives a function that does one step and returns
the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from qwen3_lit.losses.language_model import language_model_loss
from qwen3_lit.losses.load_balance import GlobalBatchBalance
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.hf_config import hf_config_dict
from qwen3_lit.model.transformer import Qwen3

SIZES = Path(__file__).resolve().parents[1] / "recipes" / "size"
TINY = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY |= {"intermediate_size": 128, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Batch:
    """Documents of one length, in our packed form and as a padded batch without padding."""

    documents: int
    length: int
    token_ids_T: Tensor

    @classmethod
    def random(cls, documents: int, length: int, vocab: int, device: torch.device) -> "Batch":
        generator = torch.Generator(device).manual_seed(0)
        tokens = documents * length
        return cls(documents, length, torch.randint(vocab, (tokens,), device=device, generator=generator))

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """What ``Qwen3.forward`` takes."""
        device, tokens = self.token_ids_T.device, len(self.token_ids_T)
        positions_T = torch.arange(self.length, device=device).repeat(self.documents)
        bounds = torch.arange(0, tokens + 1, self.length, device=device, dtype=torch.int32)
        return self.token_ids_T, positions_T, bounds, self.length

    @property
    def targets_T(self) -> Tensor:
        """The next token of the same document."""
        targets_BL = self.token_ids_T.view(self.documents, self.length).roll(-1, dims=1).clone()
        targets_BL[:, -1] = -100
        return targets_BL.flatten()


def read_size(name: str, device: torch.device, **changes: Any) -> ModelConfig:
    """The configuration of ``recipes/size/<name>.yaml``; tiny on a CPU."""
    overlay = yaml.safe_load((SIZES / f"{name}.yaml").read_text())
    sizes = overlay["model"]["init_args"]["config"] | changes
    if device.type != "cuda":
        sizes |= TINY | {"num_hidden_layers": 2}
        sizes |= {"num_experts": 8, "num_experts_per_tok": 2} if sizes["num_experts"] else {}
    return ModelConfig(**sizes)


def build(make: Callable[[], torch.nn.Module], device: torch.device) -> Any:
    """A model with bfloat16 weights, made where it shall be."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return make()
    finally:
        torch.set_default_dtype(before)


def our_step(
    config: ModelConfig, batch: Batch, device: torch.device, compile_blocks: bool, attention: str
) -> Callable[[], Tensor]:
    """Forward and backward of ours, balance loss included."""
    model = build(lambda: Qwen3(replace(config, attention_backend=attention)), device)
    if compile_blocks:
        model.compile_blocks(fullgraph=device.type == "cuda", backend="inductor" if device.type == "cuda" else "eager")
    balance, inputs, targets_T = GlobalBatchBalance(0.001), batch.packed, batch.targets_T

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        out = model(*inputs)
        loss = language_model_loss(out.hidden_TD, model.lm_head_weight, targets_T).loss
        total = loss + balance.loss(out.routing)
        total.backward()
        balance.after_optimizer_step(model)
        return loss.detach()

    return step


def transformers_step(config: ModelConfig, batch: Batch, device: torch.device, liger: bool) -> Callable[[], Tensor]:
    """transformers' model with torch's grouped products and SDPA; with Liger's RoPE, RMSNorm and linear cross-entropy.

    Without their balance loss, which would make them slower. Liger's experts tune themselves for minutes and stay out.
    """
    import transformers

    settings = transformers.Qwen3MoeConfig(**hf_config_dict(config, "bfloat16"))
    implementations = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    model = build(lambda: transformers.AutoModelForCausalLM.from_config(settings, **implementations), device)
    model.train()
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

        apply_liger_kernel_to_qwen3_moe(swiglu=False, model=model)
    token_ids = batch.token_ids_T.view(batch.documents, batch.length)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=token_ids, labels=token_ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def torchtitan_step(config: ModelConfig, batch: Batch, device: torch.device) -> Callable[[], Tensor]:
    """torchtitan's Qwen3 (0.2; 0.3 has another interface): its attention (cuDNN first), grouped products and own way to
    compile.

    Without its balance by a bias, which belongs to the optimizer.
    """
    from torchtitan.components.loss import build_cross_entropy_loss
    from torchtitan.config import JobConfig
    from torchtitan.models.llama4.infra.parallelize import apply_compile
    from torchtitan.models.qwen3 import Qwen3Model, qwen3_args

    job = JobConfig()
    job.compile.enable = device.type == "cuda"
    arguments = replace(
        qwen3_args["30B-A3B"],
        vocab_size=config.vocab_size,
        max_seq_len=batch.length,
        head_dim=config.head_dim,
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        moe_inter_dim=config.moe_intermediate_size,
    )
    arguments.moe_args = replace(
        arguments.moe_args, num_experts=config.num_experts, top_k=config.num_experts_per_tok, load_balance_coeff=None
    )
    model = build(lambda: Qwen3Model(arguments), device)
    with torch.no_grad():
        model.init_weights(device)
    if job.compile.enable:
        apply_compile(model, job.compile, ep_enabled=False)
    cross_entropy = build_cross_entropy_loss(job)
    token_ids = batch.token_ids_T.view(batch.documents, batch.length)
    targets = batch.targets_T.view(batch.documents, batch.length)
    num_targets = (targets != -100).sum()

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = cross_entropy(model(token_ids), targets) / num_targets
        loss.backward()
        return loss.detach()

    return step
