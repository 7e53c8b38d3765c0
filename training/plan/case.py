"""A model under a strategy on a system: what a rank has of it."""

from dataclasses import dataclass

import torch

from training.memory import ModelState, model_state
from training.plan.activations import Precision
from training.plan.shapes import Shape
from training.plan.strategies import Buffers, Strategy, buffers
from training.plan.system import System

# Share of ZeRO-3's weights that is there when forward ends. As each of a block's 9 modules begins (itself, two norms,
# attention, MLP, four matrices) one more matrix is fetched ahead. So forward's are all fetched when 4/9 of the blocks
# have run; next are backward's, of which those 4/9 are away and come back, while the others still wait to be used.
AHEAD = 4 / 9


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

        Of ZeRO-3 none, whatever stage3_max_reuse_distance says: what a module releases DeepSpeed 0.19 works out once,
        in the first pass whose order it knows, which is one of an evaluation and has no backward. A run that begins
        without one, as a benchmark does, keeps all that is used again within that distance.
        """
        if self.strategy.fsdp:
            return self.count if self.strategy.keeps else self.shape.head()
        return 0

    def gathered(self) -> float:
        """Elements of weights that are whole at a time, besides a rank's own; of autocast, the copies."""
        if self.strategy.fsdp:  # this block, the next, and the buffer in which it arrives
            return min(self.count, self.kept() + 3 * self.shape.block())
        if self.strategy.stage == 3:  # of one rank, the whole is its own
            return min(AHEAD * self.count, self.sizes.max_live) if self.shard > 1 else 0
        return self.count if self.precision.autocast else 0
