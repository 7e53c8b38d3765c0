"""DDP over slow links: gradients in 16 bits, PowerSGD, and DiLoCo, whose ranks exchange weights once in many steps."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.optim import SGD, Optimizer

from training.checkpoint import CheckpointWriter, read_metadata
from training.config import PlainTrainConfig
from training.distributed import Ranks
from training.model_state import from_whole, read_torch_file
from training.optim import states_by_name

POWERSGD_RANK = 4  # of the two thin matrices that ranks send in place of a gradient
OUTER_LR, OUTER_MOMENTUM = 0.7, 0.9  # DiLoCo's (its section 3)
MEMORIES = ("error_dict", "p_memory_dict", "q_memory_dict")  # of PowerSGD: bucket -> tensor


def make_link(model: nn.Module, ddp: Any, optimizer: Optimizer, cfg: PlainTrainConfig, ranks: Ranks) -> Any:
    """What has a state to save and load; None if DDP only averages in another dtype."""
    if cfg.outer_steps:
        return DiLoCo(model, optimizer, cfg, ranks)
    if cfg.grad_compression == "powersgd":
        return PowerSGD(ddp, cfg, ranks)
    return ddp.register_comm_hook(cfg.exchange_dtype(), average_in)


def average_in(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A hook of DDP: average gradients in another dtype. torch's own one for bfloat16 works with NCCL only."""
    sent = bucket.buffer().to(dtype).div_(dist.get_world_size())  # before the sum, which may overflow
    future = dist.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))


def read_own(folder: Path, name: str) -> Any:
    """Content of a checkpoint's file; None if it has none, as that of another strategy or number of ranks."""
    return read_torch_file(folder / name, mmap=False) if name in read_metadata(folder)["files"] else None


def compress(state: PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """torch's hook, one bucket after the other: gloo runs its steps in threads, and would mix up those of several."""
    future = powerSGD_hook(state, bucket)
    future.wait()  # on a GPU, only its stream waits
    return future


class PowerSGD:
    """After warm-up, sends two thin matrices per gradient, and adds what they lack to the next (arXiv:1905.13727)."""

    def __init__(self, ddp: Any, cfg: PlainTrainConfig, ranks: Ranks):
        self.ddp, self.ranks, self.shape = ddp, ranks, (cfg.batch_size, cfg.block_size)
        self.file = f"powersgd_{ranks.rank:05d}.pt"  # what was left out differs from rank to rank
        self.state = PowerSGDState(None, POWERSGD_RANK, max(2, cfg.warmup_iters), orthogonalization_epsilon=1e-8)
        ddp.register_comm_hook(self.state, compress)

    def save(self, writer: CheckpointWriter) -> None:
        writer.write(self.file, {name: getattr(self.state, name) for name in (*MEMORIES, "iter")})

    def load(self, folder: Path) -> None:
        """A collective. Without a file for each rank, the first gradients are sent whole, as in a new run."""
        saved = read_own(folder, self.file)
        if read_metadata(folder)["world_size"] != self.ranks.world_size or not saved:
            return
        # the memories are those of DDP's buckets, whose final order is that of the first backward pass
        tokens = torch.zeros(self.shape, dtype=torch.int64, device=self.ranks.device)
        self.ddp(tokens, tokens).backward()
        self.ddp.zero_grad()
        for name in MEMORIES:
            setattr(self.state, name, {bucket: memory.to(self.ranks.device) for bucket, memory in saved[name].items()})
        self.state.iter = saved["iter"]


class DiLoCo:
    """Ranks train alone for outer_steps steps; then all take one step on the mean of what they changed.

    Douillard et al., arXiv:2311.08105, algorithm 1. Not equal to training with DDP, by design.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, cfg: PlainTrainConfig, ranks: Ranks):
        self.model, self.optimizer, self.cfg, self.ranks = model, optimizer, cfg, ranks
        self.anchor = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.outer = SGD(self.anchor.values(), OUTER_LR, OUTER_MOMENTUM, nesterov=True)
        self.file = f"replica_{ranks.rank:05d}.pt"

    @torch.no_grad()
    def exchange(self, step: int) -> None:
        """A collective after every outer_steps-th step."""
        if (step + 1) % self.cfg.outer_steps:
            return
        changes = []
        for name, weight in self.model.named_parameters():
            change = (self.anchor[name] - weight).to(self.cfg.exchange_dtype()).div_(self.ranks.world_size)
            changes.append((self.anchor[name], change, dist.all_reduce(change, async_op=True)))
        for anchor, change, work in changes:
            work.wait()
            anchor.grad = change.to(anchor.dtype)
        self.outer.step()
        self.outer.zero_grad()
        for name, weight in self.model.named_parameters():
            weight.copy_(self.anchor[name])

    def save(self, writer: CheckpointWriter) -> None:
        """Between two outer steps, ranks differ; model.pt and optimizer.pt are those of rank 0."""
        if self.ranks.main:
            momentum = {name: self.outer.state[anchor] for name, anchor in self.anchor.items()}
            writer.write("outer.pt", {"anchor": self.anchor, "momentum": momentum})
        else:
            states = states_by_name(self.model, self.optimizer)
            writer.write(self.file, {"model": dict(self.model.named_parameters()), "optimizer": states})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """A rank without a file of its own goes on as rank 0; without outer.pt, a new round begins."""
        if own := read_own(folder, self.file):
            from_whole(folder, own["model"], own["optimizer"], {}).into(self.model, self.optimizer)
        saved = read_own(folder, "outer.pt") or {"anchor": dict(self.model.named_parameters()), "momentum": {}}
        for name, anchor in self.anchor.items():
            anchor.copy_(saved["anchor"][name])
            state = saved["momentum"].get(name, {})
            self.outer.state[anchor] = {kind: value.to(anchor.device) for kind, value in state.items()}
