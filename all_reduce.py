"""The bandwidth of an all-reduce, measured as a run would do it: by NCCL on GPUs, by gloo on CPUs.

    python launch.py 8 all_reduce.py

doctor.py starts it between hosts. It prints the bus bandwidth, 2 (n - 1) / n x bytes / seconds: what each of n ranks
sends, and receives as much, whatever n is, if they form a ring (NVIDIA's nccl-tests, PERFORMANCE.md). The bytes grow
until they take a second, so that a slow link takes seconds, too.
"""

import argparse
import json
import math
import time

import torch
import torch.distributed as dist

from training import distributed, ending
from training.distributed import Ranks
from training.errors import UserError

FIRST, LARGEST = 2**20, 2**26  # bytes of the first all-reduce, and of one; more are several
ENOUGH = 1.0  # seconds
MINUTES = 0.1  # until ranks that do not find each other give up, besides distributed.LATER


def measure(ranks: Ranks) -> dict[str, float]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--backend", default="auto", help="auto, nccl, gloo")
    args = parser.parse_args()
    if distributed.world_size() < 2:
        raise UserError("an all-reduce needs ranks; write python launch.py 2 all_reduce.py")
    with distributed.start(args.device, args.backend, MINUTES) as ranks:
        found = measure(ranks)
        if ranks.main:
            print(json.dumps(found))


if __name__ == "__main__":
    ending.run(main)
