"""The model state in a checkpoint, whole and in fp32, whichever strategy wrote it; read without DeepSpeed.

The files are mapped, and whoever needs a part of a parameter, or of a moment of it, reads that part only: so a
checkpoint of any strategy and number of ranks goes into any other, and no rank holds more than its own.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.serialization import safe_globals

from training import checkpoint
from training.errors import CheckpointError
from training.sharding import KINDS, MOMENTS, WEIGHT, own

TIED = "lm_head.weight"  # the same as the embedding's
Files = list[dict[str, Any]]


class StandIn:
    """For the few classes of DeepSpeed whose objects lie in its files: no code of theirs is run to read them."""

    def __init__(self, *state: Any):
        self.state = state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


STAND_INS: list[Any] = [
    (StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (StandIn, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass
class SavedState:
    """step: AdamW's count of updates; scaler: of fp16's loss, as torch's GradScaler names what it holds."""

    folder: Path
    shapes: dict[str, torch.Size]  # of every parameter; tied ones once
    pieces: dict[tuple[str, str], list[Tensor]]  # (parameter, kind) -> what follows one another in it, flat
    step: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements start ... start + numel of the flat parameter or moment, fp32, on the CPU."""
        found, at = [], 0
        for piece in self.pieces[name, kind]:
            low, high = max(start - at, 0), min(start + numel - at, len(piece))
            if low < high:
                found.append(piece[low:high])
            at += len(piece)
        return found[0] if len(found) == 1 else torch.cat(found or [torch.empty(0)])

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        return self.part(name, kind, 0, self.shapes[name].numel()).view(self.shapes[name]).float()

    def require_moments(self) -> None:
        if lacking := [name for name in self.shapes if (name, MOMENTS[0]) not in self.pieces]:
            raise CheckpointError(f"{self.folder} holds no moments of AdamW for {lacking[0]}; take another checkpoint")

    def weights(self) -> dict[str, Tensor]:
        return {name: self.whole(name) for name in self.shapes}

    @torch.no_grad()
    def into(self, model: nn.Module, optimizer: Optimizer) -> None:
        """A model, and its AdamW: whole or, under FSDP2, this rank's shard."""
        self.require_moments()
        parameters = dict(model.named_parameters())
        assert parameters.keys() == self.shapes.keys(), f"other parameters: {parameters.keys() ^ self.shapes.keys()}"
        for name, parameter in parameters.items():
            state = optimizer.state[parameter] = fresh_state(optimizer, parameter, self.step)
            for kind, tensor in {**state, WEIGHT: parameter}.items():
                if kind in KINDS:
                    mine, start = own(tensor)
                    mine.copy_(self.part(name, kind, start, mine.numel()).view_as(mine))


def fresh_state(optimizer: Optimizer, parameter: Tensor, step: float) -> dict[str, Any]:
    """AdamW's for a parameter after `step` updates, the moments still to be filled in."""
    fused = optimizer.param_groups[0].get("fused")
    torchs = type(optimizer).__module__.startswith("torch.")
    count = torch.tensor(step, device=parameter.device if fused else "cpu") if torchs else int(step)
    return {"step": count, **{kind: torch.zeros_like(parameter, requires_grad=False) for kind in MOMENTS}}


def open_state(folder: Path, about: dict[str, Any]) -> SavedState:
    """about: the checkpoint.json of the folder.

    Raises CheckpointError where a file cannot be read, or holds anything but tensors and plain data.
    """
    if about["strategy"] == "fsdp":
        return of_shards(folder)
    if not about["strategy"].startswith("zero"):
        state = checkpoint.read(folder / "optimizer.pt")
        return of_whole(folder, checkpoint.read(folder / "model.pt"), state["optimizer"]["state"], state["scaler"])
    with safe_globals(STAND_INS):
        model = checkpoint.read(min(folder.glob("*mp_rank_00_model_states.pt")))
        if about["strategy"] == "zero0":
            weights = {name: weight for name, weight in model["module"].items() if name != TIED}
            return of_whole(folder, weights, model["optimizer"].get("state", {}), {})
        files = [states_of(folder, rank) for rank in range(about["world_size"])]
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    scale = getattr(files[0].get("loss_scaler"), "cur_scale", None)
    saved = SavedState(folder, shapes, {}, scaler={"scale": scale} if scale else {})
    if "fp32_flat_groups" not in files[0]:
        of_stages_1_and_2(saved, files)
    else:
        of_stage_3(saved, files, [flat_groups(folder, rank, file, model) for rank, file in enumerate(files)])
    return saved


def of_whole(folder: Path, weights: dict[str, Tensor], states: dict[int, Any], scaler: dict[str, Any]) -> SavedState:
    """The optimizer counts its parameters: first those that decay, then the others (training/optim.py)."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    pieces = {(name, WEIGHT): [weight.detach().flatten()] for name, weight in weights.items()}
    ordered = sorted(shapes, key=lambda name: len(shapes[name]) < 2)
    for name, number in zip(ordered, sorted(states), strict=False):
        pieces |= {(name, kind): [states[number][kind].flatten()] for kind in MOMENTS}
    return SavedState(folder, shapes, pieces, step_of(states), scaler)


def of_shards(folder: Path) -> SavedState:
    """FSDP2's: every rank has some rows of every parameter and moment (training/sharding.py)."""
    files = [checkpoint.read(path) for path in sorted(folder.glob("shard_*.pt"))]
    shapes = {name: torch.Size(shape) for name, shape in files[0]["shapes"].items()}
    pieces = {
        (name, kind): [file[kind][name].detach().flatten() for file in files] for name in shapes for kind in KINDS
    }
    return SavedState(folder, shapes, pieces, files[0]["step"], files[0]["scaler"])


def of_stages_1_and_2(saved: SavedState, files: Files) -> None:
    """A group's parameters are one flat array, cut into a part a rank; each rank notes what its part holds."""
    for file in files:
        states = file["base_optimizer_state"]["state"]
        saved.step = step_of(states)
        for number, places in enumerate(file["param_slice_mappings"]):
            flats = {WEIGHT: file["single_partition_of_fp32_groups"][number].detach(), **states.get(number, {})}
            for name, place in places.items():
                for kind in KINDS if number in states else (WEIGHT,):
                    piece = flats[kind][place.start : place.start + place.numel]
                    saved.pieces.setdefault((name, kind), []).append(piece)


def of_stage_3(saved: SavedState, files: Files, ranks: list[list[dict[str, Tensor]]]) -> None:
    """Every parameter is cut into a piece a rank, the last one padded; a rank's pieces follow one another."""
    saved.step = step_of(files[0]["optimizer_state_dict"]["state"])
    for flats in ranks:
        groups, start, flat = iter(flats), 0, {WEIGHT: torch.empty(0)}
        for name, shape in saved.shapes.items():
            if start == len(flat[WEIGHT]):
                flat, start = next(groups), 0
            size = -(-shape.numel() // len(ranks))
            for kind, numbers in flat.items():
                saved.pieces.setdefault((name, kind), []).append(numbers[start : start + size])
            start += size


def flat_groups(folder: Path, rank: int, file: dict[str, Any], model: dict[str, Any]) -> list[dict[str, Tensor]]:
    """What rank's sub-groups hold, of each kind."""
    swapped = model.get("sub_groups") or [("", 0)] * len(file["fp32_flat_groups"])
    groups = []
    for number, (flat, (name, numel)) in enumerate(zip(file["fp32_flat_groups"], swapped, strict=True)):
        state = file["optimizer_state_dict"]["state"].get(number, {})
        found = {WEIGHT: flat.detach(), **{kind: state[kind] for kind in MOMENTS if kind in state}}
        names = {kind: name if kind == WEIGHT else f"{kind}-{name}" for kind in found}
        groups.append({kind: on_disk(part, folder, rank, names[kind], numel) for kind, part in found.items()})
    return groups


def on_disk(part: Tensor, folder: Path, rank: int, name: str, numel: int) -> Tensor:
    """part itself, or, where it was on NVMe and is empty here, what DeepSpeed copied of it beside its checkpoint."""
    if len(part) or not numel:
        return part
    path = folder / "offloaded_tensors" / f"rank{rank:02d}" / f"{name}.tensor.swp"
    if not path.exists():
        raise CheckpointError(f"{path} is missing; take another checkpoint")
    return torch.from_file(str(path), size=numel, dtype=torch.float32)


def states_of(folder: Path, rank: int) -> dict[str, Any]:
    """The optimizer states of a rank, as DeepSpeed arranges them."""
    found = list(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
    if not found:
        raise CheckpointError(f"{folder} lacks the optimizer states of rank {rank}; take another checkpoint")
    return checkpoint.read(found[0])["optimizer_state_dict"]


def step_of(states: dict[int, dict[str, Any]]) -> float:
    return max((float(state["step"]) for state in states.values()), default=0.0)
