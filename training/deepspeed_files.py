"""DeepSpeed's checkpoint files, read and written as ours are, and what it forgets to restore from them."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from training import checkpoint
from training.weights import STAND_INS, flat_part, states_of


class DeepSpeedFiles:
    """Takes the place of reading and writing in an engine, whose own runs any code that a file holds.

    An error of the disk inside engine.save_checkpoint would leave the other ranks in its barriers: it is kept, and
    raised by `check` when all ranks are out of it.
    """

    def __init__(self, engine: Any):
        for _, path in STAND_INS:
            module, name = path.rsplit(".", 1)
            torch.serialization.add_safe_globals([getattr(import_module(module), name)])
        engine.checkpoint_engine.save, engine.checkpoint_engine.load = self.save, self.load
        self.failed: OSError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            checkpoint.write(Path(path), state_dict)
        except OSError as error:
            self.failed = error

    def load(self, path: str, map_location: Any = None) -> Any:
        return checkpoint.read(Path(path))

    def check(self) -> None:
        error, self.failed = self.failed, None
        if error:
            raise error


def sub_groups(optimizer: Any) -> list[tuple[str, int]]:
    """(name of its swap files, elements on this rank) of each part that ZeRO-3 takes to the optimizer at a time."""
    names = [flat.ds_id for flat in optimizer.fp32_partitioned_groups_flat]
    return list(zip(names, optimizer.fp16_partitioned_groups_flat_numel, strict=True))


def restore_swapped(optimizer: Any, folder: Path, rank: int, names: list[tuple[str, int]]) -> None:
    """After engine.load_checkpoint with an optimizer on NVMe: DeepSpeed 0.19.8 copies its swap files back, but leaves
    the moments in them and all that was too small to be swapped as they were, and says nothing of it.

    Each sub-group is brought to memory, filled, and swapped out again, as an update does it. names: what `sub_groups`
    said when the checkpoint was written.
    """
    optimizer.checkpoint_event_prologue()  # partitions what small parameters are kept whole; the epilogue gathers them
    saved = states_of(folder, rank)
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        swapped = optimizer._swappable_optimizer_subgroup(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        state = saved["optimizer_state_dict"]["state"][number]
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = flat_part(state[key], folder, rank, f"{key}-{names[number][0]}", names[number][1])
        flat.data.copy_(flat_part(saved["fp32_flat_groups"][number], folder, rank, *names[number]))
        optimizer.optimizer.state[flat] = state
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(number)
    optimizer.checkpoint_event_epilogue()
