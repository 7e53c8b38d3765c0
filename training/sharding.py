"""FSDP2's settings, the ranks it shards over, and what one of them holds; train.py calls `fully_shard` itself."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from training.config import FSDP, Problem, key
from training.distributed import Ranks, world_size
from training.saving import Files
from training.train_config import TrainConfig

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")  # of AdamW
KINDS = (WEIGHT, *MOMENTS)


@dataclass(frozen=True)
class PlainTrainConfig(TrainConfig):
    """The settings of both scripts, and those of train.py alone."""

    strategy: str = key("auto", "auto (one process, or DDP on several ranks), ddp, fsdp", "Strategy")
    reshard_after_forward: bool = key(
        True, "fsdp: gather a block's weights anew for backward (FULL_SHARD); False: keep them (SHARD_GRAD_OP)"
    )
    shard_ranks: int = key(0, "fsdp: ranks that share one copy of the model state (HSDP), as those of a node; 0: all")
    cpu_offload: bool = key(False, "fsdp: model state and optimizer in the CPU's memory")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.strategy not in ("auto", "ddp", "fsdp"):
            yield "strategy", "must be one of auto, ddp, fsdp; ZeRO is train_deepspeed.py's"
        elif self.strategy != "fsdp":
            for name in FSDP[1:]:
                if getattr(self, name) != PlainTrainConfig.__dataclass_fields__[name].default:
                    yield name, f"is FSDP's, strategy is {self.strategy!r}; set --strategy=fsdp"
        ranks, shared = world_size(), self.shard_ranks
        if shared < 0 or (shared and ranks % shared):
            fits = [n for n in range(1, ranks + 1) if ranks % n == 0]
            yield "shard_ranks", f"must divide the {ranks} ranks: 0, or one of {', '.join(map(str, fits))}"


def strategy_of(cfg: PlainTrainConfig, ranks: Ranks) -> str:
    return "fsdp" if cfg.strategy == "fsdp" else "ddp" if ranks.world_size > 1 else "single"


def copy_ranks(cfg: TrainConfig, ranks: Ranks) -> int:
    """The ranks that share one copy of what is partitioned: all of them but for HSDP."""
    return getattr(cfg, "shard_ranks", 0) or ranks.world_size


def mesh(cfg: PlainTrainConfig, ranks: Ranks) -> DeviceMesh:
    """Of all ranks; for HSDP (Zhao et al., arXiv:2304.11277, section 3.2.2) of copies x ranks that share one."""
    if cfg.shard_ranks in (0, ranks.world_size):
        return init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    shape = ranks.world_size // cfg.shard_ranks, cfg.shard_ranks
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))


def own(tensor: Any) -> tuple[Tensor, int]:
    """What this rank holds of a parameter or moment, and the place of its first element in the whole, flat.

    FSDP2 cuts along the first dimension, as torch.chunk does: the last ranks may have less, or nothing.
    """
    if not hasattr(tensor, "to_local"):  # no DTensor, whose import takes half a second
        return tensor, 0
    shard: DeviceMesh = tensor.device_mesh["shard"]
    rows = -(-tensor.size(0) // shard.size())
    first = min(shard.get_local_rank() * rows, tensor.size(0))
    return tensor.to_local(), first * math.prod(tensor.shape[1:])


@torch.no_grad()
def put(tensor: Tensor, whole: Tensor) -> None:
    """Into what this rank holds of a tensor: its part of the whole."""
    mine, start = own(tensor)
    mine.copy_(whole.flatten()[start : start + mine.numel()].view_as(mine))


def whole(tensor: Any) -> Tensor:
    """Summed up over the ranks that have a part of it each, where it is sharded: a collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save(files: Files, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """This rank's shard of the weights and moments, one file; of several copies (HSDP), the first writes."""
    first: Any = next(model.parameters())
    place = dict(zip(first.device_mesh.mesh_dim_names or (), first.device_mesh.get_coordinate() or (), strict=True))
    if place.get("replicate", 0):
        return
    parameters = dict(model.named_parameters())
    state: dict[str, Any] = {"shapes": {name: tuple(parameter.shape) for name, parameter in parameters.items()}}
    state[WEIGHT] = {name: own(parameter)[0] for name, parameter in parameters.items()}
    for kind in MOMENTS:
        state[kind] = {name: own(optimizer.state[parameter][kind])[0] for name, parameter in parameters.items()}
    state |= {"step": float(optimizer.state[first]["step"]), "scaler": scaler.state_dict()}
    files.write(f"shard_{place['shard']:04d}.pt", state)
