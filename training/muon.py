"""Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): momentum whose update is made orthogonal."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

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
    """Orthogonalize matrices whose rows are sharded, in place; each rank does one of every world_size of them."""
    mesh = matrices[0].device_mesh
    group = mesh.get_group(mesh.ndim - 1)  # of HSDP's dimensions the last one, which shards
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for start in range(0, len(matrices), ranks):
        batch = matrices[start : start + ranks]
        local = [matrix.to_local() for matrix in batch]
        sizes = [part.numel() for part in local] + [0] * (ranks - len(batch))  # that this rank sends to each
        mine = local[0].new_empty(batch[rank].shape if rank < len(batch) else (0, 1))
        parts = [part.numel() for part in mine.chunk(ranks)] if mine.numel() else []
        parts += [0] * (ranks - len(parts))  # that it gets from each
        dist.all_to_all_single(mine.view(-1), torch.cat([part.flatten() for part in local]), parts, sizes, group)
        mine = orthogonalize(mine).contiguous() if mine.numel() else mine
        back = mine.new_empty(sum(sizes))
        dist.all_to_all_single(back, mine.view(-1), sizes, parts, group)
        for part, update in zip(local, back.split(sizes), strict=False):
            part.copy_(update.view_as(part))
