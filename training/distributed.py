"""Ranks: who am I among how many, on which device; the only reader of the launcher's environment variables."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from data.errors import DataError
from training.errors import ConfigError, NodeError, Stopped, UserError

LATER = timedelta(seconds=30)  # than the watchdog, which says more
DTYPES = ("auto", "float32", "bfloat16", "float16")
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Ranks on this node; LOCAL_SIZE is what DeepSpeed's launcher calls it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))


@dataclass(frozen=True)
class Ranks:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo, for the ranks' own affairs; None: the default group is

    @property
    def main(self) -> bool:
        return self.rank == 0

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks, in place; every rank must call it."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def gather(self, numbers: list[float]) -> list[list[float]]:
        """The numbers of every rank, by rank. On the CPU: nobody waits for a device."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        all_ranks = [torch.empty_like(mine) for _ in range(self.world_size)]
        if self.world_size == 1:
            return [mine.tolist()]
        dist.all_gather(all_ranks, mine, group=self.control)
        return [row.tolist() for row in all_ranks]

    def share(self, value: Any) -> list[Any]:
        """Plain data of every rank, by rank."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value, group=self.control)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails for the user on one rank (a full disk, a missing file) fails on all, with the same message."""
        mine: str | None = None
        try:
            yield
        except (UserError, DataError, OSError) as error:
            mine = words(error)
        first = next((error for error in self.share(mine) if error is not None), None)
        if first is not None:
            raise UserError(first)


ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@contextmanager
def start(device: str, backend: str, minutes: float = 10, alone: bool = False, host: bool = False) -> Iterator[Ranks]:
    """Join the process group if a launcher started several ranks, and leave it at the end.

    minutes: to wait for the other ranks, here and in every collective; 0: ten.
    alone: a process without others has a process group, too; DeepSpeed and FSDP2 need one.
    host: the ranks of GPUs send one another what is in the CPU's memory, too: FSDP2's offloaded gradients have a norm.
    """
    ranks = Ranks(rank(), local_rank(), world_size(), pick_device(device, local_rank(), world_size()))
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    elif ranks.device.type == "cpu":  # large tensors on huge pages: page faults were a third of a ZeRO step
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if alone:  # DeepSpeed asks these two what torch is told here
        os.environ["DS_ACCELERATOR"] = ranks.device.type
        os.environ.setdefault("LOCAL_RANK", "0")
    if ranks.world_size == 1 and not alone:
        yield ranks
        return
    ranks = join(ranks, backend, timedelta(minutes=minutes or 10) + LATER, host)
    try:
        yield ranks
    except Stopped:  # by all ranks
        leave()
        raise
    leave()


def join(ranks: Ranks, backend: str, timeout: timedelta, host: bool) -> Ranks:
    if backend == "auto":
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    if backend == "nccl" and ranks.device.type != "cuda":
        raise ConfigError(f"backend = 'nccl': needs GPUs, this run is on {ranks.device.type}; leave it at auto")
    bound = ranks.device if backend == "nccl" else None
    backends = "cpu:gloo,cuda:nccl" if bound and host else backend
    if ranks.world_size == 1:
        dist.init_process_group(backends, store=dist.HashStore(), rank=0, world_size=1, device_id=bound)
    else:
        try:
            dist.init_process_group(backends, timeout=timeout, device_id=bound)
        except RuntimeError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise NodeError(
                f"rank {ranks.rank} could not join the others at {address} ({str(error).splitlines()[0]}); "
                "every host must reach that; where a host has several networks, name the right one in "
                f"{backend.upper()}_SOCKET_IFNAME"
            ) from None
    return replace(ranks, control=dist.new_group(backend="gloo", timeout=timeout) if bound else None)


def leave() -> None:
    """Only on a good way out: after an error the others may be gone, and a barrier would wait for them."""
    dist.barrier()
    dist.destroy_process_group()


def pick_device(wanted: str, local_rank: int, ranks: int) -> torch.device:
    """This rank's device; ConfigError where it is not there."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        wanted = "cpu" if wanted == "mps" and ranks > 1 else wanted  # MPS has no collectives
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"device = {wanted!r}: unknown; write auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        visible = torch.cuda.device_count()
        here = local_world_size()
        index = local_rank if ranks > 1 else device.index or 0
        if max(index + 1, here) > visible:  # on every rank alike: none waits for one that gave up
            what = f"{here} ranks on this machine" if ranks > 1 else f"device = {wanted!r}"
            raise ConfigError(f"{what}: {visible} GPUs are visible; use fewer ranks, or --device=cpu")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device = 'mps': this machine has none; use --device=cpu")
    if device.type not in ("cpu", "mps"):
        raise ConfigError(f"device = {wanted!r}: not supported; write auto, cpu, cuda, cuda:1 or mps")
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the matmuls; ConfigError where the device lacks it."""
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return torch.float32 if device.type != "cuda" else torch.bfloat16 if has_bf16 else torch.float16
    if wanted == "bfloat16" and not has_bf16:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"dtype = 'bfloat16': {name} lacks it; use float16 or float32")
    if wanted == "float16" and device.type == "cpu":
        raise ConfigError("dtype = 'float16': a CPU lacks it; use bfloat16 or float32")
    return getattr(torch, wanted)


def words(error: Exception) -> str:
    """One line for the user."""
    if not isinstance(error, OSError):
        return str(error)
    fix = "; make room or choose another --out_dir" if error.errno in NOT_WRITABLE else ""
    return f"{error.filename or 'input/output'}: {error.strerror or error}{fix}"
