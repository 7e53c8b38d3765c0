"""A checkpoint's model state, put into a DeepSpeed engine: of any strategy, and of any number of ranks.

DeepSpeed's own load_checkpoint takes only what the same ZeRO stage wrote on as many ranks. Its universal checkpoints,
which are for the rest, need a pass over the whole state with its own tool, and in version 0.19.8 lose weight decay and
step counts under ZeRO-3; what its NVMe offload saves, it does not restore. Here each rank fills its own partition.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from training.checkpoint import read_about
from training.distributed import Ranks
from training.errors import CheckpointError
from training.model_state import SavedState, fresh_state, step_count
from training.saved_state import STAND_INS, reading, states_of
from training.sharding import KINDS, WEIGHT

Place = tuple[str, int, int, int]  # a parameter; its element that the piece begins with; where in the flat; how many


def load_native(engine: Any, folder: Path) -> None:
    """DeepSpeed's own loading, of what the same strategy wrote on as many ranks. Every rank calls it.

    It would take the hyperparameters from the file, too, and counts of steps as the optimizer had them that wrote it:
    here they are the run's, and as the optimizer has them that goes on (torch's or DeepSpeed's, whichever compiles).
    """
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    own = [{k: v for k, v in group.items() if k not in ("params", "lr", "step")} for group in inner.param_groups]
    clip = getattr(optimizer, "clip_grad", None)
    engine.load_checkpoint(folder.parent, tag=folder.name)
    for group, settings in zip(inner.param_groups, own, strict=True):
        group.update(settings)
    for parameter, state in inner.state.items():
        if "step" in state:
            state["step"] = step_count(inner, parameter, float(state["step"]))
    if clip is not None:
        optimizer.clip_grad = clip
    if engine.lr_scheduler:
        engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)


def is_native(engine: Any, folder: Path) -> bool:
    """Whether DeepSpeed takes what the same strategy wrote on as many ranks.

    It does not restore what its NVMe offload saves, nor, of stage 3, another sub_group_size than the JSON has by now.
    """
    if read_about(folder)["strategy"].endswith("_nvme"):
        return False
    if not engine.zero_optimization_partition_weights():
        return True
    with safe_globals(STAND_INS):
        saved = states_of(folder, torch.distributed.get_rank(engine.optimizer.dp_process_group))["fp32_flat_groups"]
    return [len(flat) for flat in saved] == [len(flat) for flat in engine.optimizer.fp32_partitioned_groups_flat]


def load_partition(engine: Any, folder: Path, ranks: Ranks) -> None:
    """engine: fresh from deepspeed.initialize. Every rank calls it. CheckpointError where moments are missing."""
    with reading(folder, ranks) as saved:
        saved.require_moments()
        fill(engine, folder, saved)
    optimizer, step = engine.optimizer, read_about(folder)["step"]
    if "scale" in saved.scaler and hasattr(getattr(optimizer, "loss_scaler", None), "cur_scale"):
        optimizer.loss_scaler.cur_scale = saved.scaler["scale"]
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    if engine.lr_scheduler:
        engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration + int(saved.step))


def fill(engine: Any, folder: Path, saved: SavedState) -> None:
    """This rank's part of the model state, by stage."""
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        saved.into(engine.module, optimizer)
    elif not engine.zero_optimization():
        raise CheckpointError(f"zero0 in float16 takes only checkpoints of its own, not {folder}; take another stage")
    elif engine.zero_optimization_partition_weights():
        fill_sub_groups(engine.module, optimizer, saved)
    else:
        fill_groups(engine.module, optimizer, saved)


def fill_groups(model: Any, optimizer: Any, saved: SavedState) -> None:
    """Stages 1 and 2: a flat part of each group of parameters."""
    inner = optimizer.optimizer
    places: dict[int, list[Place]] = {}
    for name, parameter in model.named_parameters():
        if piece := parameter._hp_mapping:  # of it, this rank has some
            here, there = piece.hp_fragment_address, piece.lp_fragment_address
            places.setdefault(piece.param_group_index, []).append((name, there.start, here.start, there.numel))
    for number, group in enumerate(inner.param_groups):
        (flat,) = group["params"]
        state = inner.state[flat] = fresh_state(inner, flat, saved.step)
        copy(saved, places.get(number, []), flat, state)
    optimizer.update_lp_params()


def fill_sub_groups(model: Any, optimizer: Any, saved: SavedState) -> None:
    """Stage 3: the rank's pieces of some parameters, brought to memory, filled, swapped out again."""
    inner, names = optimizer.optimizer, {parameter: name for name, parameter in model.named_parameters()}
    rank = torch.distributed.get_rank(optimizer.dp_process_group)
    optimizer.checkpoint_event_prologue()  # partitions what small parameters are kept whole; the epilogue gathers them
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        swapped = optimizer._swappable_optimizer_subgroup(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        state = inner.state[flat] = fresh_state(inner, flat, saved.step)
        copy(saved, list(cuts(optimizer.fp16_groups[number], names, rank)), flat, state)
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(number)
    optimizer.checkpoint_event_epilogue()


def cuts(parameters: list[Any], names: dict[Any, str], rank: int) -> Iterator[Place]:
    """A piece a rank, all of the same size, the last one padded."""
    at = 0
    for parameter in parameters:
        size = parameter.partition_numel()
        first = min(rank * size, parameter.ds_numel)
        yield names[parameter], first, at, min(size, parameter.ds_numel - first)
        at += size


@torch.no_grad()
def copy(saved: SavedState, places: list[Place], flat: Tensor, state: dict[str, Tensor]) -> None:
    for name, first, at, numel in places:
        if numel:
            for kind in KINDS:
                target = flat if kind == WEIGHT else state[kind]
                target[at : at + numel].copy_(saved.part(name, kind, first, numel))
                saved.done(numel)


def sub_groups(engine: Any) -> list[tuple[str, int]]:
    """Of an optimizer on NVMe: (name of its swap files, elements on this rank) of what it takes at a time."""
    if not engine.zero_nvme_offload_optimizer():
        return []
    names = [flat.ds_id for flat in engine.optimizer.fp32_partitioned_groups_flat]
    return list(zip(names, engine.optimizer.fp16_partitioned_groups_flat_numel, strict=True))
