"""The weights in a checkpoint, whole and in fp32, whichever strategy wrote it; read without DeepSpeed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from training import checkpoint
from training.errors import CheckpointError

Groups = list[dict[str, torch.Size]]  # of the optimizer: parameter name -> whole shape


class StandIn:
    """For the few classes of DeepSpeed whose objects lie in its files: no code of theirs is run to read them."""

    def __init__(self, *state: Any):
        self.state = state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


TIED = "lm_head.weight"  # the same as the embedding's
STAND_INS: list[Any] = [
    (StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (StandIn, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def trained_weights(folder: Path, about: dict[str, Any]) -> dict[str, Tensor]:
    """name -> fp32 weight, on the CPU; tied weights once. about: the checkpoint.json of the folder.

    Raises CheckpointError where a file cannot be read, or holds anything but tensors and plain data.
    """
    if not about["strategy"].startswith("zero"):
        return checkpoint.read(folder / "model.pt")
    with safe_globals(STAND_INS):
        model = checkpoint.read(min(folder.glob("*mp_rank_00_model_states.pt")))
        if about["strategy"] == "zero0":
            return {name: weight.float() for name, weight in model["module"].items() if name != TIED}
        states = [states_of(folder, rank) for rank in range(about["world_size"])]
    groups: Groups = model["param_shapes"]
    if "fp32_flat_groups" not in states[0]:
        return dict(of_stages_1_and_2(states, groups))
    parts = []
    for rank, state in enumerate(states):
        names = model.get("sub_groups") or [("", 0)] * len(state["fp32_flat_groups"])
        flat = zip(state["fp32_flat_groups"], names, strict=True)
        parts.append(torch.cat([flat_part(part, folder, rank, *name) for part, name in flat]))
    return dict(of_stage_3(parts, groups))


def states_of(folder: Path, rank: int) -> dict[str, Any]:
    """The optimizer states of a rank, as DeepSpeed arranges them."""
    found = list(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
    if not found:
        raise CheckpointError(f"{folder} lacks the optimizer states of rank {rank}; take another checkpoint")
    return checkpoint.read(found[0])["optimizer_state_dict"]


def flat_part(part: Tensor, folder: Path, rank: int, name: str, numel: int) -> Tensor:
    """part itself, or, where it was on NVMe and is empty here, what DeepSpeed copied of it beside its checkpoint."""
    if len(part) or not numel:
        return part
    path = folder / "offloaded_tensors" / f"rank{rank:02d}" / f"{name}.tensor.swp"
    if not path.exists():
        raise CheckpointError(f"{path} is missing; take another checkpoint")
    return torch.from_file(str(path), size=numel, dtype=torch.float32)


def of_stages_1_and_2(states: list[dict[str, Any]], groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """A group's parameters are one flat array, cut into a part a rank; each rank notes what its part holds."""
    for number, shapes in enumerate(groups):
        for name, shape in shapes.items():
            pieces = []
            for state in states:
                if name in (places := state["param_slice_mappings"][number]):
                    numel, start = places[name].numel, places[name].start
                    pieces.append(state["single_partition_of_fp32_groups"][number].detach()[start : start + numel])
            yield name, torch.cat(pieces).view(shape)


def of_stage_3(parts: list[Tensor], groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """Every parameter is cut into a piece a rank, the last one padded; a rank's pieces follow one another."""
    start = 0
    for name, shape in (item for group in groups for item in group.items()):
        size = -(-shape.numel() // len(parts))
        yield name, torch.cat([part[start : start + size] for part in parts])[: shape.numel()].view(shape)
        start += size
