"""The bandwidth of an all-reduce, measured as a run would do it: by NCCL on GPUs, by gloo on CPUs.

Bus bandwidth, 2 (n - 1) / n x bytes / seconds: what each of n ranks sends, and receives as much, whatever n is, if they
form a ring (NVIDIA's nccl-tests, PERFORMANCE.md).
"""

import math
import time

import torch
import torch.distributed as dist

from training.distributed import Ranks

FIRST, LARGEST = 2**20, 2**26  # bytes of the first all-reduce, and of one; more are several
ENOUGH = 1.0  # seconds


def measure(ranks: Ranks) -> dict[str, float]:
    """A collective. The bytes grow until they take a second, so that a slow link takes seconds, too."""
    count, seconds = FIRST, timed(FIRST, ranks)
    while seconds < ENOUGH:
        count = math.ceil(count * min(8, max(2, 1.2 * ENOUGH / seconds)))
        seconds = timed(count, ranks)
    sent = 2 * (ranks.world_size - 1) / ranks.world_size * count
    return {"ranks": ranks.world_size, "bytes": count, "seconds": seconds, "gbit_per_second": 8e-9 * sent / seconds}


def timed(count: int, ranks: Ranks) -> float:
    """Seconds that so many bytes take: on every rank those of the slowest."""
    rounds = math.ceil(count / LARGEST)
    numbers = torch.zeros(math.ceil(count / rounds / 4), device=ranks.device)
    dist.all_reduce(numbers[:1])  # all are there
    wait(ranks)
    begun = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(numbers)
    wait(ranks)
    seconds = torch.tensor([time.perf_counter() - begun], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def wait(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
