"""Evaluation: the mean loss of both splits over the same batches each time, shared out over the ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from training.batches import Batches
from training.distributed import Ranks

Stop = Callable[[], bool]  # whether to give up; a collective


@torch.no_grad()
def evaluate(
    loss_of: Callable[[Tensor, Tensor], Tensor], batches: Batches, ranks: Ranks, count: int, stop: Stop = lambda: False
) -> dict[str, float]:
    """{"train_loss", "val_loss"} in nats per token, over `count` batches of each split; every rank must call it.

    Empty where the run was asked to stop meanwhile.
    All ranks take equally many forward passes, so that none waits in a collective for another: where the ranks do not
    divide `count`, the surplus passes weigh nothing.
    """
    sums = torch.zeros(2, device=ranks.device)
    for number, split in enumerate(("train", "val")):
        for first in range(0, count, ranks.world_size):
            index = first + ranks.rank
            loss = loss_of(*batches.evaluation(split, index))
            if index < count:
                sums[number] += loss
            if stop():
                return {}
    train, val = (ranks.mean(sums) * ranks.world_size / count).tolist()
    return {"train_loss": train, "val_loss": val}
