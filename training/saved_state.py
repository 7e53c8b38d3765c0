"""The model state in a checkpoint, whole and in fp32, whichever strategy wrote it; read without DeepSpeed.

The files are mapped, and whoever needs a part of a parameter, or of a moment of it, reads that part only: so a
checkpoint of any strategy and number of ranks goes into any other, and no rank holds more than its own.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals
from tqdm import tqdm

from training import files
from training.checkpoint import read_about
from training.distributed import Ranks
from training.errors import CheckpointError
from training.model_state import TIED, SavedState
from training.sharding import KINDS, MOMENTS, WEIGHT

States = list[dict[str, Any]]  # of each rank


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


def open_state(folder: Path, about: dict[str, Any]) -> SavedState:
    """about: the checkpoint.json of the folder.

    Raises CheckpointError where a file cannot be read, or holds anything but tensors and plain data.
    """
    if about["strategy"] == "fsdp":
        return of_shards(folder)
    if not about["strategy"].startswith("zero"):
        state = files.read(folder / "optimizer.pt")
        return of_whole(folder, files.read(folder / "model.pt"), state["optimizer"]["state"], state["scaler"])
    with safe_globals(STAND_INS):
        model = files.read(min(folder.glob("*mp_rank_00_model_states.pt")))
        if about["strategy"] == "zero0":
            weights = {name: weight for name, weight in model["module"].items() if name != TIED}
            return of_whole(folder, weights, model["optimizer"].get("state", {}), {})
        states = [states_of(folder, rank) for rank in range(about["world_size"])]
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    scale = getattr(states[0].get("loss_scaler"), "cur_scale", None)
    saved = SavedState(folder, shapes, {}, scaler={"scale": scale} if scale else {})
    if "fp32_flat_groups" not in states[0]:
        of_stages_1_and_2(saved, states)
    else:
        of_stage_3(saved, states, [flat_groups(folder, rank, state, model) for rank, state in enumerate(states)])
    return saved


@contextmanager
def reading(folder: Path, ranks: Ranks) -> Iterator[SavedState]:
    """The same of a complete checkpoint, for a run to go on from: with a bar while it is read, and how long it took."""
    about, since = read_about(folder), time.perf_counter()
    quiet = None if ranks.main else True  # None: where nobody looks
    with tqdm(desc=f"reading {folder.name}", unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
        yield replace(open_state(folder, about), done=lambda numel: bar.update(4 * numel))
    if ranks.main:
        n = about["world_size"]
        of = f"{about['strategy']} on {n} rank{'s' * (n > 1)}"
        print(f"read {folder.name} of {of} in {time.perf_counter() - since:.1f} s", flush=True)


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
    shards = [files.read(path) for path in sorted(folder.glob("shard_*.pt"))]
    shapes = {name: torch.Size(shape) for name, shape in shards[0]["shapes"].items()}
    pieces = {
        (name, kind): [shard[kind][name].detach().flatten() for shard in shards] for name in shapes for kind in KINDS
    }
    return SavedState(folder, shapes, pieces, shards[0]["step"], shards[0]["scaler"])


def of_stages_1_and_2(saved: SavedState, ranks: States) -> None:
    """A group's parameters are one flat array, cut into a part a rank; each rank notes what its part holds."""
    for file in ranks:
        states = file["base_optimizer_state"]["state"]
        saved.step = step_of(states)
        for number, places in enumerate(file["param_slice_mappings"]):
            flats = {WEIGHT: file["single_partition_of_fp32_groups"][number].detach(), **states.get(number, {})}
            for name, place in places.items():
                for kind in KINDS if number in states else (WEIGHT,):
                    piece = flats[kind][place.start : place.start + place.numel]
                    saved.pieces.setdefault((name, kind), []).append(piece)


def of_stage_3(saved: SavedState, states: States, ranks: list[list[dict[str, Tensor]]]) -> None:
    """Every parameter is cut into a piece a rank, the last one padded; a rank's pieces follow one another."""
    saved.step = step_of(states[0]["optimizer_state_dict"]["state"])
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
    return files.read(found[0])["optimizer_state_dict"]


def step_of(states: dict[int, dict[str, Any]]) -> float:
    return max((float(state["step"]) for state in states.values()), default=0.0)
