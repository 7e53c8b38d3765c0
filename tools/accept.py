"""Check that this code is right and fast on this machine, against the CPU and fixed targets (docs/gpu.md).

    python -m tools.accept --peer=../nanoGPT
    python -m tools.accept --only=fp32,resume,zero2_124m
    python -m tools.accept --device=cpu

It downloads nothing. Ctrl-C keeps the results so far. Exit status: 0 if all stages passed, 1 if one failed or was not
run, 2 for a wrong option.
"""

import json
import re
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from data.tokenizer import tokenizer_from
from tests.acceptance import TINY, Acceptance, choose, correctness, page, speed, write_data
from tools.terminal import make_parser
from training import distributed
from training.config import ROOT
from training.errors import UserError
from training.run_folder import environment


def main() -> None:
    parser = make_parser("accept", __doc__ or "")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, no targets")
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT, whose train.py is timed as well")
    parser.add_argument("--write", type=Path, help="folder for the results; default: results/gpu_NAME, on CPUs none")
    parser.add_argument("--only", default="", help="run only these: comma-separated prefixes of stages or groups")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of the whole run")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: no GPU is visible; --device=cpu runs the same stages at tiny size")
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
    write = args.write or (ROOT / "results" / f"gpu_{re.sub('[^a-z0-9]+', '_', gpu.lower())}" if gpu else None)
    if write:
        write.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    about = environment(replace(distributed.SINGLE_PROCESS, device=torch.device(args.device)))
    with tempfile.TemporaryDirectory(prefix="accept-") as folder:
        acceptance, data = Acceptance(Path(folder), write, gpu, args.minutes), Path(folder, "data")
        write_data(data, tokenizer_from({"name": "gpt2" if gpu else "byte"}), 8_000_000 if gpu else 50_000)
        gpt2 = f"config/train_gpt2.py --dataset={data}{'' if gpu else TINY + ' --device=cpu'}"
        peer = f"--peer={args.peer.resolve()}" if args.peer else ""
        stages = [*correctness(bool(gpu), data, gpt2), *speed(bool(gpu), gpt2, peer)]
        passed = acceptance.run(choose(stages, args.only.split(",")))
    counts = Counter(result["status"] for result in acceptance.results.values())
    acceptance.say(", ".join(f"{number} {status}" for status, number in counts.items()))
    if write:
        found = json.dumps({"machine": about, "stages": acceptance.results}, indent=1)
        (write / "accept.json").write_text(found + "\n")
        (write / "README.md").write_text(page(about, acceptance.results))
    sys.exit(not passed)


if __name__ == "__main__":
    distributed.run(main)
