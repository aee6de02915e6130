"""Muon: momentum whose update is orthogonalised, for matrices and stacks of experts; AdamW for everything else.

Own code beside torch.optim.Muon for two reasons: that one refuses 3-D parameters, and the experts are stacked
``[E, rows, columns]`` tensors, each expert a matrix of its own; and Lightning's loop and the sharded checkpoint want
one optimizer object, so AdamW for embeddings, routers and norms has to live in the same one. On 2-D parameters the
update equals torch.optim.Muon's (a test compares them).

Sources: K. Jordan et al., "Muon" (2024); scale 0.2 * sqrt(max(rows, columns)) from Moonlight (2502.16982), eq. 4, so
that AdamW's learning rates and decay carry over. Sharded parameters: a stack sharded on dim 0 holds whole experts and
is orthogonalised where it lies; a sharded matrix is gathered, and each rank keeps its part of the result.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from qwen3_lit.errors import UserError
from qwen3_lit.optim.param_groups import OptimizerConfig, OptimizerFactory

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
FUSED_GATE_UP = "gate_up"


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix of each matrix in ``update`` [..., rows, columns], roughly: the quintic
    Newton-Schulz iteration leaves singular values between about 0.7 and 1.2. Computed in bf16 as published."""
    a, b, c = NEWTON_SCHULZ
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for groups with ``algorithm: muon``, AdamW for groups with ``algorithm: adamw``."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        """
        Args:
            groups: parameter groups, each with ``algorithm``; ``row_blocks`` (default 1) is the number of matrices
                stacked along the rows of each parameter (2 for fused gate and up projections).
            lr: default learning rate.
            momentum: Nesterov momentum of the muon groups.
            steps: Newton-Schulz iterations.
            betas: Adam's, for the adamw groups.
            eps: Adam's, for the adamw groups.

        Raises:
            UserError: a muon group holds a parameter that is neither a matrix nor a stack of matrices.
        """
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "steps": steps,
            "betas": betas,
            "eps": eps,
            "weight_decay": 0.0,
            "algorithm": "muon",
            "row_blocks": 1,
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["algorithm"] == "muon" and parameter.ndim not in (2, 3):
                    raise UserError(
                        f"Muon: got a parameter of shape {tuple(parameter.shape)}, expected 2 or 3 dimensions"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon_step if group["algorithm"] == "muon" else self._adamw_step
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, parameter.grad, group)
        return loss

    def _muon_step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1.0 - group["momentum"])
        update = _orthogonalized(grad.lerp(buffer, group["momentum"]), group["steps"], group["row_blocks"])
        rows, columns = parameter.shape[-2] // group["row_blocks"], parameter.shape[-1]
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))

    def _adamw_step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        state["exp_avg"].lerp_(grad, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        denominator = (state["exp_avg_sq"] / (1.0 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1.0 - beta1**step))


def _orthogonalized(update: Tensor, steps: int, row_blocks: int) -> Tensor:
    if isinstance(update, DTensor):
        mesh, placements = update.device_mesh, update.placements
        if update.ndim == 3 and all(placement.is_shard(0) or placement.is_replicate() for placement in placements):
            local = _orthogonalized(update.to_local(), steps, row_blocks)
            return DTensor.from_local(
                local, mesh, placements, shape=update.shape, stride=update.stride(), run_check=False
            )
        # Every rank computes the same full result, so the parts can be cut without a broadcast.
        full = _orthogonalized(update.full_tensor(), steps, row_blocks)
        return distribute_tensor(full, mesh, placements, src_data_rank=None)
    if update.numel() == 0:
        return update
    blocks = update.unflatten(-2, (row_blocks, -1))
    return orthogonalize(blocks, steps).flatten(-3, -2)


class MuonFactory(OptimizerFactory):
    """Muon for every hidden matrix and expert, AdamW for embeddings, output head, routers, norms and biases."""

    def __init__(self, momentum: float = 0.95, steps: int = 5) -> None:
        """
        Args:
            momentum: Nesterov momentum of the orthogonalised update.
            steps: Newton-Schulz iterations.
        """
        if not 0.0 <= momentum < 1.0 or steps < 1:
            raise UserError(
                f"MuonFactory: got momentum {momentum}, steps {steps}, expected 0 <= momentum < 1 and steps >= 1"
            )
        self.momentum, self.steps = momentum, steps

    def build(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
        typed = [piece for group in groups for piece in _split_by_algorithm(group)]
        return Muon(
            typed,
            lr=config.learning_rate,
            momentum=self.momentum,
            steps=self.steps,
            betas=config.betas,
            eps=config.eps,
        )


def _split_by_algorithm(group: dict[str, Any]) -> list[dict[str, Any]]:
    rest = {key: value for key, value in group.items() if key != "parameter_names"}
    if group["name"] != "matrix":
        return [{**rest, "algorithm": "adamw", "row_blocks": 1}]
    # The rows of a fused gate and up projection are two matrices; the shape does not tell, so the name decides.
    named = list(zip(group["parameter_names"], group["params"], strict=True))
    fused = [parameter for name, parameter in named if FUSED_GATE_UP in name]
    plain = [parameter for name, parameter in named if FUSED_GATE_UP not in name]
    pieces = [("matrix", plain, 1), ("gate_up", fused, 2)]
    return [
        {**rest, "name": name, "params": parameters, "algorithm": "muon", "row_blocks": blocks}
        for name, parameters, blocks in pieces
        if parameters
    ]
