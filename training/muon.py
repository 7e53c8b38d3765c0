"""Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): momentum whose update is made orthogonal."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from training.model_state import MOMENTUM_BUFFER


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T, by Newton-Schulz iterations; in bf16 on GPUs."""
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    scale = math.sqrt(max(1, matrix.size(-2) / matrix.size(-1)))  # so that all shapes learn at one rate
    return (scale * (x.mT if tall else x)).to(matrix.dtype)


def nesterov(grad: Tensor, momentum: Tensor, beta: float) -> Tensor:
    """The momentum to make orthogonal; changes `momentum`."""
    momentum.lerp_(grad, 1 - beta)
    return grad.lerp(momentum, beta)


class Muon(torch.optim.AdamW):
    """Muon for groups with "momentum", AdamW for the others. Parameters are whole, or FSDP2's shards."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if "momentum" in group:
                self.update(group)
        return super().step(closure)

    def update(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        updates: list[Any] = []
        for parameter in parameters:
            state = self.state[parameter]
            if MOMENTUM_BUFFER not in state:
                state[MOMENTUM_BUFFER] = torch.zeros_like(parameter)
            updates.append(nesterov(parameter.grad, state[MOMENTUM_BUFFER], group["momentum"]))
        if updates and isinstance(updates[0], DTensor):
            orthogonalize_shards(updates)
        else:
            updates = [orthogonalize(update) for update in updates]
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
            parameter.grad = None  # AdamW leaves out parameters without a gradient


def orthogonalize_shards(matrices: list[DTensor]) -> None:
    """Orthogonalize matrices whose rows are sharded, in place; the ranks share those of each shape."""
    by_shape: dict[torch.Size, list[Any]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    for same in by_shape.values():
        rows: Any = torch.stack(same)  # each rank has some rows of all
        whole = rows.redistribute(placements=[*rows.placements[:-1], Shard(0)])  # each rank has all rows of some
        updates: Any = orthogonalize(whole)
        for matrix, update in zip(same, updates.redistribute(placements=rows.placements).to_local(), strict=True):
            matrix.to_local().copy_(update)
