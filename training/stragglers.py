"""Stragglers: slow ranks, which make all others wait. One process alone has none."""

import math
import socket
import time
from collections.abc import Iterator
from statistics import median, median_low

import torch

from training.devices import time_matmul
from training.distributed import Ranks
from training.run_control import PROCESS_START

PROBE_SHARE = 0.005  # measuring the ranks takes at most this share of the time, and is part of step_ms
PROBE_HISTORY = 5  # a rank is judged by the median of the last five: a slow moment is not a slow node
SLOWER_MS = 1.0  # at least this much above the median rank
# Size of the square matrices, repeats, and the ratio to the median rank from which a rank counts as slow. The matmuls
# take 2 ms in bf16 on an H100, and 5 ms in fp32 on a core; CPUs are shared and noisy.
PROBES = {"cuda": (4096, 10, 1.2), "cpu": (512, 1, 3.0)}


class Stragglers:
    """Finds slow ranks: a hot GPU, a host with other work. By step time all look alike, so each times a matmul."""

    def __init__(self, ranks: Ranks, dtype: torch.dtype):
        self.ranks, self.dtype = ranks, dtype
        self.size, self.repeats, self.ratio = PROBES.get(ranks.device.type, PROBES["cpu"])
        self.reported: set[int] = set()
        self.history: list[list[float]] = []  # the last measurements: milliseconds by rank
        self.next_step = 0
        self.measured: tuple[int, float] | None = None  # step and time of the last measurement
        self.hosts = ranks.share(socket.gethostname())

    def measure(self, step: int) -> list[float]:
        """A collective at the steps where a measurement is due; returns milliseconds by rank, or [] if it is not."""
        if step < self.next_step:
            return []
        last_step, last_time = self.measured or (step - 1, PROCESS_START)
        step_seconds = (time.monotonic() - last_time) / (step - last_step)
        seconds = time_matmul(self.ranks.device, self.dtype, self.size, self.repeats)
        pause = seconds * (self.repeats + 1) / PROBE_SHARE / step_seconds  # in steps; one more repeat warms up
        times, pauses = zip(*self.ranks.share([1e3 * seconds * self.repeats, pause]), strict=True)
        self.history = [*self.history, list(times)][-PROBE_HISTORY:]
        self.next_step = step + math.ceil(pauses[0])  # rank 0's, so that all ranks measure at the same step
        self.measured = step, time.monotonic()
        return self.history[-1]

    def newly_slow(self) -> Iterator[str]:
        """A line for each rank that has become slow since the last call."""
        if len(self.history) < PROBE_HISTORY:
            return
        times = [median(values) for values in zip(*self.history, strict=True)]
        typical = median_low(times)
        for rank, ms in enumerate(times):
            if ms > max(self.ratio * typical, typical + SLOWER_MS) and rank not in self.reported:
                self.reported.add(rank)
                where = f"rank {rank} on {self.hosts[rank]}"
                yield f"{where} slows down all ranks: its matmul takes {ms:.1f} ms, the median rank's {typical:.1f}"
