"""The memory of a rank: what the model state takes by formula, and what to try where it is not enough."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPTConfig
from training.distributed import Ranks
from training.errors import RankError
from training.sharding import copy_ranks
from training.train_config import TrainConfig
from training.units import gigabytes

NOTE = "out_of_memory.txt"  # in the run folder
FULL = ("out of memory", "can't allocate memory")  # what torch says on GPUs, and on CPUs
ORDER = ("single", "ddp", "zero0", "zero1", "zero2", "zero2_offload", "fsdp", "zero3", "zero3_offload", "zero3_nvme")


@dataclass(frozen=True)
class ModelState:
    """Bytes of a rank; offloaded ones are in the host's memory, or on its disk."""

    weights: float
    gradients: float
    optimizer_states: float

    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer_states


def model_state(strategy: str, ranks: int, parameters: int, dtype: torch.dtype, fp32_sums: bool = True) -> ModelState:
    """(2 + 2 + K) bytes a parameter, K = 12, less what the stage partitions (ZeRO, arXiv:1910.02054, section 3.1).

    In fp32, and under autocast, weights and gradients have 4 bytes; the moments are 8, DeepSpeed's own copy of the
    weights 4 more. FSDP2 partitions what DDP has; ranks are then those that share one copy. fp32_sums: gradients are
    accumulated in 4 bytes, which stage 1 keeps besides the 2.
    """
    zero = strategy.startswith("zero")
    stage = int(strategy[4]) if zero else 3 if strategy.startswith("fsdp") else 0
    half = dtype != torch.float32 and zero and stage > 0
    weights, gradients, states = (2, 2, 12) if half else (4, 4, 12 if zero and stage else 8)
    if half and fp32_sums:
        gradients = 6 if stage == 1 else 4
    parts = ((weights, 3), (gradients, 2), (states, 1))
    return ModelState(*(parameters * size / (ranks if stage >= first else 1) for size, first in parts))


@contextmanager
def explained(cfg: TrainConfig, ranks: Ranks, model: GPTConfig, strategy: str, dtype: torch.dtype) -> Iterator[None]:
    """Around all that allocates: raises RankError with what takes the memory, and what to try, where it is full."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not any(words in str(error) for words in FULL):
            raise
        text = advice(cfg, ranks, model, strategy, dtype, f"rank {ranks.rank}: {str(error).splitlines()[0]}")
        # who only evaluates leaves the run folder as it is, and may find a training run's note there
        raise RankError(text if cfg.eval_only or first(Path(cfg.out_dir) / NOTE, text) else "") from None


def first(note: Path, text: str) -> bool:
    """Whether this rank is the first to note it: often all ranks' memory is full at the same step."""
    try:
        with note.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def advice(cfg: TrainConfig, ranks: Ranks, model: GPTConfig, strategy: str, dtype: torch.dtype, said: str) -> str:
    size, world_size, on_gpu = model.parameter_count(), ranks.world_size, ranks.device.type == "cuda"
    held = model_state(strategy, copy_ranks(cfg, ranks), size, dtype)
    parts = f"weights {gb(held.weights)}, gradients {gb(held.gradients)}, optimizer states {gb(held.optimizer_states)}"
    lines = [said, f"by formula, the model state of a rank under {strategy} is {gb(held.total())}: {parts}"]
    if on_gpu:
        others = torch.cuda.max_memory_allocated(ranks.device) - held.total()
        lines.append(f"activations and buffers took up to {gb(max(0, others))} besides")
    lines.append("to try, in this order; the loss stays the same:")
    if cfg.batch_size > 1:
        batch_size = max(n for n in range(1, cfg.batch_size) if cfg.batch_size % n == 0)
        more = cfg.gradient_accumulation_steps * cfg.batch_size // batch_size
        lines.append(f"  --batch_size={batch_size} --gradient_accumulation_steps={more}")
    if not cfg.activation_checkpointing:
        lines.append("  --activation_checkpointing=True")
    for other in ORDER[ORDER.index(strategy) + 1 :]:
        less = model_state(other, world_size, size, dtype).total()
        if "_" not in other and less < held.total():
            lines.append(f"  ./launch_{other if other == 'fsdp' else 'deepspeed_' + other}.sh: {gb(less)}")
        elif other == "zero3_nvme" or (other == "zero3_offload" and on_gpu):
            lines.append(f"  ./launch_deepspeed_{other}.sh: {gb(less)}, on the {'disk' if 'nvme' in other else 'CPU'}")
    return "\n  ".join(lines)


def gb(size: float) -> str:
    return gigabytes(size, 2)
