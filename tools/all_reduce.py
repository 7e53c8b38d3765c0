"""Measure the bandwidth of an all-reduce as a training run does it: with NCCL on GPUs, with gloo on CPUs.

    python -m launch.ranks 8 -m tools.all_reduce

Rank 0 prints one JSON object. Its bandwidth is the bus bandwidth, 2 (n - 1) / n x bytes / seconds: what each of n ranks
sends and receives in a ring all-reduce, whatever n is (NVIDIA's nccl-tests, PERFORMANCE.md).
"""

import json
import time

import torch
import torch.distributed as dist

from tools.terminal import make_parser
from training import distributed
from training.devices import synchronize
from training.errors import UserError

LARGEST_BYTES = 2**26  # of one all-reduce; more bytes take several
TIMEOUT_MINUTES = 0.1  # for ranks that cannot reach each other


def measure(ranks: distributed.Ranks) -> dict[str, float]:
    """Bus bandwidth between the ranks, a collective. Bytes grow from 1 MiB until the slowest rank takes a second."""
    size, seconds = 2**18, torch.zeros(1)
    while seconds < 1:
        size *= 4
        tensor = torch.zeros(min(size, LARGEST_BYTES) // 4, device=ranks.device)
        dist.all_reduce(tensor[:1])  # waits for all ranks
        synchronize(ranks.device)
        since = time.perf_counter()
        for _ in range(max(1, size // LARGEST_BYTES)):
            dist.all_reduce(tensor)
        synchronize(ranks.device)
        seconds = torch.tensor([time.perf_counter() - since], device=ranks.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
    rate = 2 * (ranks.world_size - 1) / ranks.world_size * size / seconds.item()
    measured = {"ranks": ranks.world_size, "bytes": size, "seconds": seconds.item()}
    return {**measured, "bytes_per_second": rate, "gbit_per_second": 8e-9 * rate}


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
