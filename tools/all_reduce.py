"""Measure the bandwidth of an all-reduce as a training run does it: with NCCL on GPUs, with gloo on CPUs.

    python -m launch.ranks 8 -m tools.all_reduce

Rank 0 prints one JSON object. Its bandwidth is the bus bandwidth, 2 (n - 1) / n x bytes / seconds: what each of n ranks
sends and receives in a ring all-reduce, whatever n is (NVIDIA's nccl-tests, PERFORMANCE.md).
"""

import json
import math
import time

import torch
import torch.distributed as dist

from tools.terminal import make_parser
from training import distributed
from training.devices import synchronize
from training.distributed import Ranks
from training.errors import UserError

FIRST_BYTES, LARGEST_BYTES = 2**20, 2**26  # the first measurement; one all-reduce, larger ones are split
ENOUGH_SECONDS = 1.0
TIMEOUT_MINUTES = 0.1  # for ranks that cannot reach each other


def measure(ranks: Ranks) -> dict[str, float]:
    """Bus bandwidth between the ranks; a collective. The size grows until an all-reduce takes a second."""
    size, seconds = FIRST_BYTES, time_all_reduce(FIRST_BYTES, ranks)
    while seconds < ENOUGH_SECONDS:
        size = math.ceil(size * min(8, max(2, 1.2 * ENOUGH_SECONDS / seconds)))
        seconds = time_all_reduce(size, ranks)
    rate = 2 * (ranks.world_size - 1) / ranks.world_size * size / seconds
    measured = {"ranks": ranks.world_size, "bytes": size, "seconds": seconds}
    return {**measured, "bytes_per_second": rate, "gbit_per_second": 8e-9 * rate}


def time_all_reduce(size: int, ranks: Ranks) -> float:
    """Seconds to all-reduce `size` bytes; every rank returns the time of the slowest."""
    repeats = math.ceil(size / LARGEST_BYTES)
    tensor = torch.zeros(math.ceil(size / repeats / 4), device=ranks.device)
    dist.all_reduce(tensor[:1])  # waits for all ranks
    synchronize(ranks.device)
    since = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    synchronize(ranks.device)
    seconds = torch.tensor([time.perf_counter() - since], device=ranks.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def main() -> None:
    parser = make_parser("all_reduce", __doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--backend", default="auto", help="auto, nccl or gloo")
    args = parser.parse_args()
    if distributed.world_size() < 2:
        raise UserError("an all-reduce needs 2 ranks or more; run python -m launch.ranks 2 -m tools.all_reduce")
    with distributed.start(args.device, args.backend, TIMEOUT_MINUTES) as ranks:
        result = measure(ranks)
        if ranks.main:
            print(json.dumps(result))


if __name__ == "__main__":
    distributed.run(main)
