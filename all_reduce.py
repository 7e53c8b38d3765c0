"""The bandwidth of an all-reduce, measured as a run would do it: by NCCL on GPUs, by gloo on CPUs.

    python launch.py 8 all_reduce.py

doctor.py starts it between hosts. It prints the bus bandwidth (training/bandwidth.py).
"""

import argparse
import json

from training import bandwidth, distributed, ending
from training.errors import UserError

MINUTES = 0.1  # until ranks that do not find each other give up, besides distributed.LATER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--backend", default="auto", help="auto, nccl, gloo")
    args = parser.parse_args()
    if distributed.world_size() < 2:
        raise UserError("an all-reduce needs ranks; write python launch.py 2 all_reduce.py")
    with distributed.start(args.device, args.backend, MINUTES) as ranks:
        found = bandwidth.measure(ranks)
        if ranks.main:
            print(json.dumps(found))


if __name__ == "__main__":
    ending.run(main)
