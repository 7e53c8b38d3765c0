"""DeepSpeed's own checkpoint of ZeRO-1, 2 or 3, as engine.load_checkpoint takes it on as many ranks of that stage.

Written rank after rank, as DeepSpeed 0.19.8 arranges it (its runtime/engine.py, runtime/zero/stage_1_and_2.py and
stage3.py: `state_dict` and `load_state_dict`), in a run folder: so train_deepspeed.py goes on from it.
"""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import Checkpoints
from training.formats import lazy, torch_file
from training.formats.adamw import groups, param_groups
from training.formats.lazy import Lazy
from training.formats.options import Options
from training.formats.torch_file import foreign
from training.model_state import TIED, SavedState
from training.saving import Saver
from training.sharding import KINDS as KINDS
from training.sharding import MOMENTS, WEIGHT

VERSION = "0.19.8"  # of DeepSpeed, whose layout this is
SUB_GROUP_SIZE = 10**9  # elements; as deepspeed_configs/zero3_config.json has it
LossScaler = foreign("deepspeed.runtime.fp16.loss_scaler.LossScaler")
Address = foreign("deepspeed.utils.tensor_fragment.fragment_address")
Pieces = list[tuple[str, int, int]]  # of parameters: name, first element, number; zeros follow up to the flat's size


def write(saved: SavedState, about: dict[str, Any], target: Path, options: Options) -> list[str]:
    layout = {"strategy": f"zero{options.stage}", "world_size": options.ranks, "dtype": options.dtype}
    prefix = "bf16_" if options.dtype == "bfloat16" else ""
    with Saver(Checkpoints(str(target))).writing({**about, **layout}, best=False) as files:
        for rank in range(options.ranks):
            of_stage = stage_3 if options.stage == 3 else stages_1_and_2
            state = {"optimizer_state_dict": of_stage(saved, about, rank, options), "ds_version": VERSION}
            torch_file.save(files.folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", state)
        names = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(options.ranks)]
        for name in names if options.stage == 3 else ["mp_rank_00"]:
            torch_file.save(files.folder / f"{name}_model_states.pt", model(saved, about, options))
    return []


def model(saved: SavedState, about: dict[str, Any], options: Options) -> dict[str, Any]:
    """The weights, in the dtype that the model computes in; of stage 3, whose ranks have none of them, their names."""
    dtype = options.torch_dtype
    weights = {name: lazy.stored(saved, name, dtype=dtype) for name in saved.shapes}
    if options.stage == 3:
        weights = {name: lazy.of(torch.empty(0, dtype=dtype)) for name in saved.shapes}
    frozen: dict[str, Any] | None = OrderedDict() if options.stage > 1 else None  # there are none
    return {
        "module": OrderedDict({**weights, TIED: weights["transformer.wte.weight"]}),
        **{"buffer_names": [], "optimizer": None, "data_sampler": None, "random_ltd": None},
        "param_shapes": [OrderedDict((name, saved.shapes[name]) for name in names) for names in groups(saved)],
        **{"frozen_param_shapes": frozen, "frozen_param_fragments": frozen},
        "shared_params": {TIED: "transformer.wte.weight"},
        "lr_scheduler": {"last_batch_iteration": int(saved.step) - 1},
        **{"skipped_steps": 0, "global_steps": about["step"]},
        **{"dp_world_size": options.ranks, "mp_world_size": 1},
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_version": VERSION,
        **{"step": about["step"], "sub_groups": []},
    }


def stages_1_and_2(saved: SavedState, about: dict[str, Any], rank: int, options: Options) -> dict[str, Any]:
    """A group of parameters is one flat array, padded to 2 elements a rank, and cut into a part for each rank."""
    flats: list[Lazy] = []
    paddings: list[int] = []
    addresses, states = [], {}
    for number, names in enumerate(groups(saved)):
        total = sum(saved.shapes[name].numel() for name in names)
        size = -(-total // (2 * options.ranks)) * 2
        left = rank * size
        padding = min(max(left + size - total, 0), size)
        pieces = list(part(saved, names, left, left + size))
        at, places = 0, OrderedDict()
        for name, _, numel in pieces:
            places[name] = Address(numel=numel, start=at)
            at += numel
        addresses.append(places)
        paddings.append(padding)
        flats.append(flat(saved, WEIGHT, pieces, size - padding))
        states[number] = state(saved, pieces, size)
    return {  # without clip_grad and loss_scaler, which the run then keeps as its settings say
        "overflow": False,
        "base_optimizer_state": optimizer(states, about, [[0], [1]]),
        "single_partition_of_fp32_groups": flats,
        "zero_stage": options.stage,
        "group_paddings": paddings,
        "param_alignment_paddings": [[0] * len(names) for names in groups(saved)],
        "partition_count": [options.ranks] * len(flats),
        "ds_version": VERSION,
        "param_slice_mappings": addresses,
    }


def part(saved: SavedState, names: list[str], left: int, right: int) -> Iterator[tuple[str, int, int]]:
    """What the elements left ... right are of parameters that follow one another."""
    at = 0
    for name in names:
        numel = saved.shapes[name].numel()
        first, last = max(left - at, 0), min(right - at, numel)
        if first < last:
            yield name, first, last - first
        at += numel


def stage_3(saved: SavedState, about: dict[str, Any], rank: int, options: Options) -> dict[str, Any]:
    """Each parameter is cut into a piece a rank, the last ones padded; a sub-group's pieces follow one another."""
    flats: list[Lazy] = []
    states: dict[int, Any] = {}
    numbers: list[list[int]] = []
    for names in groups(saved):
        subs = list(sub_groups(saved, names, options.ranks))
        numbers.append(list(range(len(flats), len(flats) + len(subs))))
        for sub in subs:
            pieces = [(name, rank * size(saved, name, options.ranks), size(saved, name, options.ranks)) for name in sub]
            numel = sum(count for *_, count in pieces)
            states[len(flats)] = state(saved, pieces, numel)
            flats.append(flat(saved, WEIGHT, pieces, numel))
    return {
        "loss_scaler": LossScaler(cur_scale=1.0, dynamic=False),  # of fp32 and bf16, which need none
        **{"dynamic_loss_scale": False, "overflow": False},
        "zero_stage": options.stage,
        "partition_count": options.ranks,
        "optimizer_state_dict": optimizer(states, about, numbers),
        "fp32_flat_groups": flats,
    }


def size(saved: SavedState, name: str, ranks: int) -> int:
    return -(-saved.shapes[name].numel() // ranks)


def sub_groups(saved: SavedState, names: list[str], ranks: int) -> Iterator[list[str]]:
    """What the optimizer takes at a time: SUB_GROUP_SIZE elements of a rank, or some more, in whole parameters."""
    sub: list[str] = []
    for name in names:
        sub.append(name)
        if name == names[-1] or sum(size(saved, n, ranks) for n in sub) >= SUB_GROUP_SIZE:
            yield sub
            sub = []


def state(saved: SavedState, pieces: Pieces, numel: int) -> dict[str, Any]:
    return {"step": torch.tensor(saved.step), **{kind: flat(saved, kind, pieces, numel) for kind in MOMENTS}}


def flat(saved: SavedState, kind: str, pieces: Pieces, numel: int) -> Lazy:
    return Lazy((numel,), torch.float32, lambda: stretches(saved, kind, pieces, numel))


def stretches(saved: SavedState, kind: str, pieces: Pieces, numel: int) -> Iterator[Tensor]:
    """The pieces, each followed by zeros where it reaches behind the end of its parameter, and zeros up to numel."""
    for name, first, wanted in pieces:
        there = min(max(saved.shapes[name].numel() - first, 0), wanted)
        yield from saved.chunks(name, kind, first, there)
        yield from lazy.zeros(wanted - there)
    yield from lazy.zeros(numel - sum(wanted for *_, wanted in pieces))


def optimizer(states: dict[int, Any], about: dict[str, Any], numbers: list[list[int]]) -> dict[str, Any]:
    return {"state": states, "param_groups": param_groups(about["settings"], numbers, fused=True)}
