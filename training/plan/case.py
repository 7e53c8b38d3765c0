"""A model under a strategy on a system: what a rank has of it."""

from dataclasses import dataclass

import torch

from training.memory import ModelState, model_state
from training.plan.activations import Precision
from training.plan.shapes import Shape
from training.plan.strategies import Buffers, Strategy, buffers
from training.plan.system import System


@dataclass(frozen=True)
class Case:
    shape: Shape
    strategy: Strategy
    system: System
    shard_ranks: int = 0  # of a hybrid; 0: those of a node

    @property
    def count(self) -> int:
        return self.shape.parameter_count()

    @property
    def shard(self) -> int:
        """Ranks that share one copy of what is partitioned."""
        return (self.shard_ranks or self.system.gpus) if self.strategy.hybrid else self.system.ranks

    @property
    def precision(self) -> Precision:
        half = self.system.dtype != torch.float32
        return Precision(half, half and self.strategy.autocast, self.system.on_gpu)

    @property
    def gloo(self) -> bool:
        """What CPU ranks communicate by."""
        return not self.system.on_gpu and self.system.ranks > 1

    @property
    def sizes(self) -> Buffers:
        """DeepSpeed's, of a strategy of its own."""
        return buffers(self.strategy.name, self.shape, self.system.on_gpu)

    def state(self) -> ModelState:
        name = "fsdp" if self.strategy.fsdp else self.strategy.name  # its variants partition the same
        return model_state(name, self.shard, self.count, self.system.dtype)

    def kept(self) -> float:
        """Elements of weights that backward finds where forward has left them, of those that have to be gathered.

        ZeRO-3 releases none that is used again within so many elements, which forward and backward count alike.
        """
        if self.strategy.fsdp:
            return self.count if self.strategy.keeps else self.shape.head()
        return min(self.count, self.sizes.reuse / 2) if self.strategy.stage == 3 else 0

    def gathered(self) -> float:
        """Elements of weights that are whole at a time, besides a rank's own; of autocast, the copies."""
        if self.strategy.fsdp:  # this block, the next, and the buffer in which it arrives
            return min(self.count, self.kept() + 3 * self.shape.block())
        if self.strategy.stage == 3:
            return min(self.count, self.kept() + self.sizes.prefetch + self.shape.block(), self.sizes.max_live)
        return self.count if self.precision.autocast else 0
