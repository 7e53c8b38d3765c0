"""What a rank measures of its device for --calibrate, while the others measure the same beside it."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from model import GPT, Linear
from training import bandwidth, distributed, run_folder
from training.distributed import Ranks, pick_dtype
from training.plan.shapes import Shape

MINUTES = 1.0  # to wait for the others
ROUNDS = 5  # the median of so many
ENOUGH, LONG = 0.2, 1.0  # seconds of a round; of a call that one will do for
WIDTH = {"cuda": 8192, "cpu": 1024}  # of the square matrices
COPIED = {"cuda": 2**30, "cpu": 2**27}  # bytes
UPDATED = {"cuda": 2**27, "cpu": 2**23}  # parameters
MESSAGES = 200
LAYERS = 4  # of the models that are timed, at most
BYTES = 257  # ids of the short runs' data


def sample(shape: Shape) -> Shape:
    """Of the short runs: a model as wide, of fewer blocks."""
    return replace(part(shape), name="sample", vocab_size=BYTES, bias=False, dropout=0.0)


def part(shape: Shape) -> Shape:
    return replace(shape, n_layer=min(shape.n_layer, LAYERS), hidden=0, given=0)


def run(note: str, dtype: str, shape: Shape, batch: int) -> None:
    """Measure; the main rank writes what the slowest found."""
    with distributed.start("auto", "auto", MINUTES) as ranks:
        kind, wanted = ranks.device.type, pick_dtype(dtype, ranks.device)
        found = Probe(ranks, wanted)
        numbers = {"flops": found.matmul(), "memory_rate": found.copy(), "update_rate": found.adamw()}
        numbers["achievable"] = min(1.0, found.model(shape, batch) / numbers["flops"])
        numbers["sample"] = found.model(sample(shape), batch)
        of_ranks = ranks.gather(list(numbers.values()))
        slowest = {name: min(row[number] for row in of_ranks) for number, name in enumerate(numbers)}
        several = ranks.world_size > 1
        about = {"kind": kind, "ranks": ranks.world_size, "dtype": str(wanted).removeprefix("torch.")}
        about["link"] = bandwidth.measure(ranks)["gbit_per_second"] * 1e9 / 8 if several else 0.0
        about["latency"] = found.latency() if several else 0.0
        about |= {"device": found.name(), "memory": found.memory(), "outside": found.outside()}
        if ranks.main:
            Path(note).write_text(json.dumps({**about, **slowest}))


class Probe:
    """A rank's measurements; all ranks begin each at the same time."""

    def __init__(self, ranks: Ranks, dtype: torch.dtype):
        self.ranks, self.dtype, self.kind = ranks, dtype, "cuda" if ranks.device.type == "cuda" else "cpu"

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call: the median of a few rounds of many."""
        work()
        once = self.timed(work, 1)
        self.together()
        if once > LONG:  # a slow CPU with a large model
            return self.timed(work, 1)
        count = max(1, math.ceil(ENOUGH / max(once, 1e-6)))
        return median(self.timed(work, count) for _ in range(ROUNDS)) / count

    def timed(self, work: Callable[[], object], count: int) -> float:
        bandwidth.wait(self.ranks)
        begun = time.perf_counter()
        for _ in range(count):
            work()
        bandwidth.wait(self.ranks)
        return time.perf_counter() - begun

    def together(self) -> None:
        if self.ranks.world_size > 1:
            dist.barrier()

    def matmul(self) -> float:
        """FLOP/s of large matmuls, done as the model does them."""
        width = WIDTH[self.kind]
        layer = Linear(width, width, bias=False).to(self.ranks.device, self.dtype)
        rows = torch.randn(width, width, device=self.ranks.device).to(self.dtype)
        return 2 * width**3 / self.seconds(lambda: layer(rows))

    def copy(self) -> float:
        """Bytes a second that memory reads and writes."""
        source = torch.ones(COPIED[self.kind] // 4, device=self.ranks.device)
        target = torch.empty_like(source)
        return 2 * COPIED[self.kind] / self.seconds(lambda: target.copy_(source))

    def adamw(self) -> float:
        """Bytes a second that AdamW reads and writes: 28 a parameter (timing.UPDATED)."""
        parameter = torch.nn.Parameter(torch.ones(UPDATED[self.kind], device=self.ranks.device))
        parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW([parameter], fused=True)
        return 28 * len(parameter) / self.seconds(optimizer.step)

    def model(self, shape: Shape, batch: int) -> float:
        """FLOP/s of the model's forward and backward, of a few of its blocks; as train.py runs it, uncompiled."""
        timed = part(shape)
        model = GPT(timed.gpt()).to(self.ranks.device)
        model.init_weights(0)
        tokens = torch.zeros(batch, timed.block_size, dtype=torch.int64, device=self.ranks.device)

        def work() -> None:
            with torch.autocast(self.ranks.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = model(tokens, tokens)
            loss.backward()

        return batch * timed.block_size * timed.flops_per_token() / self.seconds(work)

    def latency(self) -> float:
        """Seconds of an all-reduce of one number."""
        one = torch.zeros(1, device=self.ranks.device)
        self.together()

        def work() -> None:
            dist.all_reduce(one)
            bandwidth.wait(self.ranks)

        return self.timed(work, MESSAGES) / MESSAGES

    def name(self) -> str:
        if self.kind == "cuda":
            return torch.cuda.get_device_name(self.ranks.device)
        return run_folder.processor()

    def memory(self) -> float:
        """Bytes of a GPU, or of a rank's part of the host's memory."""
        if self.kind == "cuda":
            return torch.cuda.get_device_properties(self.ranks.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.ranks.world_size

    def outside(self) -> float:
        """Bytes that this process holds of a GPU besides torch's own: CUDA, NCCL; 0 on CPUs."""
        if self.kind != "cuda":
            return 0.0
        free, total = torch.cuda.mem_get_info(self.ranks.device)
        return max(0.0, total - free - torch.cuda.memory_reserved(self.ranks.device))
