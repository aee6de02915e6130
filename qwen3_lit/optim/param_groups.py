"""Which parameter learns how: optimizer hyper-parameters, and groups found by rule from names and shapes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qwen3_lit.errors import UserError


class OptimizerFactory:
    """Seam for the optimizer's class: `build` makes it from groups that carry lr, weight_decay and lr_scale."""

    def build(self, groups: list[dict[str, Any]], config: "OptimizerConfig") -> torch.optim.Optimizer:
        """One optimizer over all groups (one, so that Lightning's loop and the checkpoint see a single state)."""
        raise NotImplementedError


@dataclass(frozen=True)
class OptimizerConfig:
    """Hyper-parameters that every optimizer shares; `factory` names the optimizer's class."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moment."""
    eps: float = 1e-8
    """Added to Adam's denominator."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases never decay."""
    decay_embeddings: bool = False
    """Whether the token embedding and the output head decay too."""
    grad_clip_norm: float | None = 1.0
    """Largest global gradient norm; null never clips (the norm is logged all the same)."""
    embedding_lr_scale: float = 1.0
    """Learning rate of the token embedding and the output head, relative to the rest."""
    router_lr_scale: float = 1.0
    """Learning rate of the routers, relative to the rest; 0 freezes them."""
    factory: OptimizerFactory | None = None
    """Class of the optimizer; null takes torch's AdamW, fused."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0.0:
            raise UserError(f"optimizer.learning_rate: got {self.learning_rate}, expected a number > 0")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError(f"optimizer.betas: got {list(self.betas)}, expected two numbers in [0, 1)")
        if not self.eps > 0.0:
            raise UserError(f"optimizer.eps: got {self.eps}, expected a number > 0")
        if self.grad_clip_norm is not None and not self.grad_clip_norm > 0.0:
            raise UserError(
                f"optimizer.grad_clip_norm: got {self.grad_clip_norm}, expected a number > 0, or null to not clip"
            )
        for field in ("weight_decay", "embedding_lr_scale", "router_lr_scale"):
            value = getattr(self, field)
            if not value >= 0.0:
                raise UserError(f"optimizer.{field}: got {value}, expected a number >= 0")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn alike."""

    name: str
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    weight_decay: float
    lr_scale: float

    @property
    def num_elements(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def as_dict(self, learning_rate: float) -> dict[str, Any]:
        """The form torch optimizers take; ``name`` and ``lr_scale`` ride along in ``param_groups`` (and so in
        checkpoints). A factory removes ``parameter_names`` after having read it."""
        return {
            "params": list(self.parameters),
            "parameter_names": list(self.names),
            "name": self.name,
            "lr": learning_rate * self.lr_scale,
            "lr_scale": self.lr_scale,
            "weight_decay": self.weight_decay,
        }


GROUP_NAMES = ("matrix", "router", "embedding", "no_decay")


def group_of(name: str, parameter: torch.Tensor) -> str:
    """Group of one parameter, from its name and number of dimensions:

    - ``no_decay``: everything of one dimension or none (norm weights, biases);
    - ``embedding``: ``embed_tokens.weight`` and ``lm_head.weight``;
    - ``router``: ``....mlp.gate.weight``;
    - ``matrix``: every other matrix, stacked experts included.
    """
    if parameter.ndim < 2:
        return "no_decay"
    parts = name.split(".")
    if "embed_tokens" in parts or "lm_head" in parts:
        return "embedding"
    if parts[-2:] == ["gate", "weight"]:
        return "router"
    return "matrix"


def build_param_groups(model: nn.Module, config: OptimizerConfig) -> list[ParameterGroup]:
    """Trainable parameters in groups, empty groups left out, each parameter once (tied weights too).

    Raises:
        UserError: nothing is trainable.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in GROUP_NAMES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[group_of(name, parameter)].append((name, parameter))
    settings = {
        "matrix": (config.weight_decay, 1.0),
        "router": (config.weight_decay, config.router_lr_scale),
        "embedding": (config.weight_decay if config.decay_embeddings else 0.0, config.embedding_lr_scale),
        "no_decay": (0.0, 1.0),
    }
    groups = [
        ParameterGroup(
            name=name,
            names=tuple(parameter_name for parameter_name, _ in found),
            parameters=tuple(parameter for _, parameter in found),
            weight_decay=settings[name][0],
            lr_scale=settings[name][1],
        )
        for name, found in members.items()
        if found
    ]
    if not groups:
        raise UserError("optimizer: the model has no trainable parameter (requires_grad is off everywhere)")
    return groups


def describe_groups(groups: Iterable[ParameterGroup], learning_rate: float) -> str:
    """The groups as a plain text table, one line each."""
    rows = [("group", "tensors", "parameters", "lr", "weight decay", "for example")]
    rows += [
        (
            group.name,
            str(len(group.names)),
            f"{group.num_elements:,}",
            f"{learning_rate * group.lr_scale:.3g}",
            f"{group.weight_decay:g}",
            group.names[0],
        )
        for group in groups
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
