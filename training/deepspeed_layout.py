"""How ZeRO lays out the model state: reading its checkpoints without DeepSpeed, and filling an engine from any.

DeepSpeed's load_checkpoint runs any code in a file, and reads only what the same stage wrote on as many ranks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from model import GPTConfig
from training import model_state
from training.checkpoint import read_metadata
from training.distributed import Layout, Ranks
from training.fsdp import WEIGHT
from training.model_state import MOMENTUM_BUFFER, TIED, SavedState

# Part of a parameter in a rank's flat partition: (name, first element in the parameter, in the partition, elements)
Slice = tuple[str, int, int, int]
Pieces = dict[tuple[str, str], dict[int, Tensor]]  # (parameter, kind) -> rank -> its piece of the flat tensor
EXPERTS = ".experts."


class StandIn:
    """Replaces the few DeepSpeed classes that occur in its files, so that none of their code runs."""

    def __init__(self, *state: Any):
        self.state = state


STAND_INS: list[Any] = [
    *((StandIn, f"deepspeed.runtime.fp16.loss_scaler.{name}") for name in ("LossScaler", "DynamicLossScaler")),
    (StandIn, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (StandIn, "builtins.getattr"),  # by which Python 3.11.0 to 3.11.3 stores members of an enum
    (StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def open_partitions(folder: Path, metadata: dict[str, Any]) -> SavedState:
    """Open a checkpoint of train_deepspeed.py; metadata: its checkpoint.json. Raises CheckpointError."""
    layout = Layout(**metadata.get("layout", {}))
    with safe_globals(STAND_INS):
        if layout == Layout():
            return open_model_part(folder, metadata, layout, 0)[0]
        from training.deepspeed_parallel import join

        parts = [open_model_part(folder, metadata, layout, n) for n in range(layout.pipeline * layout.tensor)]
        return join(parts, GPTConfig(**metadata["model"]), layout)


def open_model_part(folder: Path, metadata: dict[str, Any], layout: Layout, number: int) -> tuple[SavedState, Pieces]:
    """What a tensor-parallel rank of a pipeline stage has, with all its replicas; and their pieces of experts."""
    path = model_state.find_file(folder, metadata, f"*mp_rank_{number:02d}_model_states.pt")
    model = model_state.read_torch_file(path)
    if metadata["strategy"] == "zero0":
        weights = {name: weight for name, weight in model["module"].items() if name != TIED}
        order = model.get("optimizer_order")
        return model_state.from_whole(folder, weights, model["optimizer"], model.get("scaler", {}), order), {}
    replicas = range(metadata["world_size"] // (layout.pipeline * layout.tensor))
    names = [f"*zero_pp_rank_{replica}_mp_rank_{number:02d}_optim_states.pt" for replica in replicas]
    files = [model_state.read_torch_file(model_state.find_file(folder, metadata, name)) for name in names]
    numbers = range(number % layout.tensor, len(files) * layout.tensor, layout.tensor)  # of the ranks in their stage
    states = {rank: file["optimizer_state_dict"] for rank, file in zip(numbers, files, strict=True)}
    first = next(iter(states.values()))
    shapes = {name: torch.Size(shape) for group in model["param_shapes"] for name, shape in group.items()}
    saved, scaler = SavedState(folder, shapes, {}), vars(first.get("loss_scaler", StandIn()))
    if scaler.get("dynamic"):
        saved.scaler = {**scaler, "scale": scaler["cur_scale"]}  # the name in torch's GradScaler
    if "fp32_flat_groups" not in first:
        by_rank = pieces_of_stages_1_and_2(saved, states)
    else:
        by_rank = pieces_of_stage_3(saved, states, model, metadata, layout)
    saved.pieces = {key: list(pieces.values()) for key, pieces in by_rank.items()}
    return saved, {key: pieces for key, pieces in by_rank.items() if EXPERTS in key[0]}


def pieces_of_stages_1_and_2(saved: SavedState, ranks: dict[int, dict]) -> Pieces:
    """Each parameter group is one flat tensor, cut into a partition per rank; each rank notes what its own holds."""
    pieces: Pieces = {}
    for rank, state_of_rank in ranks.items():
        states = state_of_rank["base_optimizer_state"]["state"]
        saved.step = model_state.find_step(states)
        for number, places in enumerate(state_of_rank["param_slice_mappings"]):
            flat = {WEIGHT: state_of_rank["single_partition_of_fp32_groups"][number].detach()}
            flat |= model_state.moments(states.get(number, {}))
            momentum, offset = flat.pop(MOMENTUM_BUFFER, None), 0
            for name, place in places.items():
                for kind, tensor in flat.items():
                    pieces.setdefault((name, kind), {})[rank] = tensor[place.start : place.start + place.numel]
                if momentum is not None:  # has all of each matrix that the partition has a part of
                    end = offset + saved.shapes[name].numel()
                    pieces.setdefault((name, MOMENTUM_BUFFER), {rank: momentum[offset:end]})
                    offset = end
    return pieces


def pieces_of_stage_3(saved: SavedState, ranks: dict[int, dict], model: dict, metadata: dict, layout: Layout) -> Pieces:
    """Each parameter is cut into a piece per rank, the last one padded; a rank's pieces follow one another."""
    pieces: Pieces = {}
    for number, (rank, state) in enumerate(ranks.items()):
        saved.step = model_state.find_step(state["optimizer_state_dict"]["state"])
        groups, start, flat = flat_groups(saved.folder, metadata, rank, state, model), 0, {WEIGHT: torch.empty(0)}
        for name, shape in saved.shapes.items():
            if start == len(flat[WEIGHT]):
                flat, start = next(groups), 0
            parts, part = len(ranks), number
            if EXPERTS in name:  # the tensor-parallel ranks share them, too
                parts, part = len(ranks) * layout.tensor // layout.expert, rank // layout.expert
            size = -(-shape.numel() // parts)
            end = start + min(size, max(0, shape.numel() - part * size))
            for kind, numbers in flat.items():
                pieces.setdefault((name, kind), {})[rank] = numbers[start:end]
            start += size
    return pieces


def flat_groups(folder: Path, metadata: dict, rank: int, state: dict, model: dict) -> Iterator[dict[str, Tensor]]:
    """The tensors of a rank's sub-groups under ZeRO-3, by kind; of what is on NVMe, DeepSpeed saves copies."""
    swapped = model.get("sub_groups") or [("", 0)] * len(state["fp32_flat_groups"])
    for number, (flat, (name, numel)) in enumerate(zip(state["fp32_flat_groups"], swapped, strict=True)):
        group = {WEIGHT: flat.detach(), **model_state.moments(state["optimizer_state_dict"]["state"].get(number, {}))}
        for kind, tensor in group.items():
            if numel and not len(tensor):
                file = f"{name}.tensor.swp" if kind == WEIGHT else f"{kind}-{name}.tensor.swp"
                path = model_state.find_file(folder, metadata, f"offloaded_tensors/rank{rank:02d}/{file}")
                group[kind] = torch.from_file(str(path), size=numel, dtype=torch.float32)
        yield group


def load_partition(engine: Any, folder: Path, ranks: Ranks) -> None:
    """Fill a new engine from a checkpoint of any strategy. A collective."""
    optimizer, metadata = engine.optimizer, read_metadata(folder)
    step = metadata["step"]
    with model_state.reading(folder, ranks) as saved:
        if ranks.layout != Layout():
            from training.deepspeed_parallel import own_part

            saved = own_part(saved, GPTConfig(**metadata["model"]), ranks)
        if isinstance(optimizer, torch.optim.Optimizer):  # ZeRO-0: not wrapped
            saved.into(engine.module, optimizer)
        elif engine.zero_optimization_partition_weights():
            fill_stage_3(engine.module, optimizer, saved)
        else:
            fill_stages_1_and_2(engine.module, optimizer, saved)
    load_scaler(engine, saved.scaler)
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    if engine.lr_scheduler:
        updates = step if saved.step is None else int(saved.step)  # fewer than steps if fp16 skipped some
        engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration + updates)


def load_scaler(engine: Any, saved: dict[str, Any]) -> None:
    """Restore the loss scale of fp16; saved: the state of torch's GradScaler or of DeepSpeed's, {} in other dtypes."""
    own = getattr(engine.optimizer, "loss_scaler", None)
    if scaler := engine.torch_autocast_z0_gradscaler:
        scaler.load_state_dict({**scaler.state_dict(), **saved})
    elif saved and getattr(own, "dynamic", False):
        vars(own).update({**{name: saved[name] for name in vars(own) if name in saved}, "cur_scale": saved["scale"]})


def fill_stages_1_and_2(model: Any, optimizer: Any, saved: SavedState) -> None:
    """Each rank holds one flat partition of every parameter group."""
    inner = optimizer.optimizer
    slices: dict[int, list[Slice]] = {}
    for name, parameter in model.named_parameters():
        if mapping := parameter._hp_mapping:  # None: no part of it is on this rank
            here, full = mapping.hp_fragment_address, mapping.lp_fragment_address
            slices.setdefault(mapping.param_group_index, []).append((name, full.start, here.start, full.numel))
    for number, group in enumerate(inner.param_groups):
        (flat,) = group["params"]
        here = sorted(slices.get(number, []), key=lambda part: part[2])
        fill_flat(saved, inner, flat, here)
        if MOMENTUM_BUFFER in inner.state[flat]:  # of whole matrices, in DeepSpeed's stages 1 and 2
            whole = [saved.whole(name, MOMENTUM_BUFFER).flatten() for name, *_ in here]
            inner.state[flat][MOMENTUM_BUFFER] = torch.cat(whole).to(flat.device)
    optimizer.update_lp_params()


def fill_stage_3(model: Any, optimizer: Any, saved: SavedState) -> None:
    """Each rank holds a part of every parameter, in sub-groups, which are swapped in and out if they are on NVMe."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer.checkpoint_event_prologue()  # partitions small parameters, which are whole; the epilogue gathers them
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        swapped = optimizer._swappable_optimizer_subgroup(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        slices, offset = [], 0
        for parameter in optimizer.fp16_groups[number]:  # every rank's part has the same size; the last one is padded
            size = parameter.partition_numel()
            rank = torch.distributed.get_rank(parameter.ds_process_group)
            start = min(rank * size, parameter.ds_numel)
            slices.append((names[parameter], start, offset, min(size, parameter.ds_numel - start)))
            offset += size
        fill_flat(saved, optimizer.optimizer, flat, slices)
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(number)
    optimizer.checkpoint_event_epilogue()


@torch.no_grad()
def fill_flat(saved: SavedState, optimizer: Any, flat: Tensor, slices: list[Slice]) -> None:
    """Fill a flat fp32 partition and its optimizer state, of whichever kinds the checkpoint has."""
    kinds = saved.kinds_of(slices[0][0]) if slices else ()
    state = optimizer.state[flat] = model_state.fresh_state(optimizer, flat, kinds, saved.step)
    for name, start, offset, numel in slices:
        for kind in (WEIGHT, *kinds):
            target = flat if kind == WEIGHT else state[kind]
            target[offset : offset + numel].copy_(saved.part(name, kind, start, numel))
