"""Stragglers: a step lasts as long as the slowest rank's, and by the clock all ranks then take the same time.

So each is asked for what it does alone: how long a matmul of a fixed size takes it (a hot GPU, a host with other work),
and how long the batches take that it reads (a slow disk).
"""

import socket
import time
from dataclasses import dataclass
from statistics import median, median_low

import torch
import torch.distributed as dist

from training.batches import Batches
from training.distributed import Ranks

LOOKS = 5  # the median of the last five: a slow moment is no slow node
BY_RANK = {"matmul_ms": "its matmuls take", "data_ms": "its batches are read in"}


@dataclass(frozen=True)
class Probe:
    width: int  # of the square matrices
    repeats: int
    slow: float  # times the median rank, from where on a rank is named; CPUs are shared, and noisy


PROBES = {"cuda": Probe(4096, 10, 1.2), "cpu": Probe(512, 1, 3.0)}  # 2 ms in bf16 on an H100; 5 in fp32 on a core
LEAST_MS = 1.0  # beyond the median rank


class Stragglers:
    def __init__(self, ranks: Ranks, batches: Batches, dtype: torch.dtype):
        self.ranks, self.batches, self.probe = ranks, batches, PROBES.get(ranks.device.type, PROBES["cpu"])
        self.named: set[tuple[int, str]] = set()
        self.looks: list[list[list[float]]] = []  # the last few: rank -> numbers in the order of BY_RANK
        self.hosts = [""] * ranks.world_size
        if ranks.world_size > 1:
            self.matrix = torch.ones(self.probe.width, self.probe.width, dtype=dtype, device=ranks.device)
            dist.all_gather_object(self.hosts, socket.gethostname(), group=ranks.control)

    def look(self) -> dict[str, list[float]]:
        """A collective. Milliseconds of every rank by the names of BY_RANK; {} where there is only one rank."""
        if self.ranks.world_size == 1:
            return {}
        self.looks = [*self.looks, self.ranks.gather([self.matmul(), self.batches.mean_ms()])][-LOOKS:]
        return {name: [rank[number] for rank in self.looks[-1]] for number, name in enumerate(BY_RANK)}

    def matmul(self) -> float:
        """Milliseconds, while the device has nothing else to do."""
        self.synchronize()
        since = time.perf_counter()
        for _ in range(self.probe.repeats):
            self.matrix @ self.matrix
        self.synchronize()
        return (time.perf_counter() - since) * 1e3

    def synchronize(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def slow(self) -> list[str]:
        """A line for each rank that has become slow since the last time."""
        lines = []
        for number, (name, words) in enumerate(BY_RANK.items() if len(self.looks) == LOOKS else ()):
            each = [median(look[rank][number] for look in self.looks) for rank in range(self.ranks.world_size)]
            usual = median_low(each)
            for rank, ms in enumerate(each):
                if ms > max(self.probe.slow * usual, usual + LEAST_MS) and (rank, name) not in self.named:
                    self.named.add((rank, name))
                    where = f"rank {rank} on {self.hosts[rank]}"
                    lines.append(f"{where} keeps all ranks waiting: {words} {ms:.1f} ms, the median rank's {usual:.1f}")
        return lines
