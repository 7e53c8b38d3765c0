"""FSDP2: the ranks it shards over, and a rank's shard of a tensor. train.py calls `fully_shard` itself."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from training.checkpoint import CheckpointWriter
from training.config import PlainTrainConfig
from training.distributed import Ranks

WEIGHT = "weight"  # the kind of a piece of model state that is a parameter; others are AdamW's, such as exp_avg


def shard_mesh(cfg: PlainTrainConfig, ranks: Ranks) -> DeviceMesh:
    """All ranks; for HSDP (Zhao et al., arXiv:2304.11277, section 3.2.2) replicas x the ranks that share one."""
    if cfg.shard_ranks in (0, ranks.world_size):
        return init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    shape = ranks.world_size // cfg.shard_ranks, cfg.shard_ranks
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))


def local_part(tensor: Any) -> tuple[Tensor, int]:
    """This rank's part of a parameter or optimizer state, and the index of its first element in the flat tensor."""
    if not hasattr(tensor, "to_local"):  # avoids importing DTensor, which takes half a second
        return tensor, 0
    shard = tensor.device_mesh["shard"]
    rows = -(-tensor.size(0) // shard.size())  # as in torch.chunk: the last ranks may have fewer, or none
    first = min(shard.get_local_rank() * rows, tensor.size(0))
    return tensor.to_local(), first * math.prod(tensor.shape[1:])


def save_shard(
    writer: CheckpointWriter, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Write this rank's shard of parameters and optimizer states; under HSDP, only the first replica writes."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    mesh: DeviceMesh = next(iter(parameters.values())).device_mesh
    if "replicate" in (mesh.mesh_dim_names or ()) and mesh.get_local_rank("replicate"):
        return
    shard: dict[str, Any] = {"shapes": {}, "step": None, "scaler": scaler.state_dict()}
    for name, parameter in parameters.items():
        shard["shapes"][name] = tuple(parameter.shape)
        for kind, value in {WEIGHT: parameter, **optimizer.state[parameter]}.items():
            if kind == "step":
                shard["step"] = float(value)
            else:
                shard.setdefault(kind, {})[name] = local_part(value)[0]
    writer.write(f"shard_{mesh.get_local_rank('shard'):04d}.pt", shard)
