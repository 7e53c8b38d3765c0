"""nanoGPT's train.py with our settings, which tools.benchmark --beside=tests.nanogpt times beside this code's.

    NANOGPT=../nanoGPT python -m tests.nanogpt single config/train_gpt2.py --steps=30

Its weights and batches are others. At the end it writes out_dir/metrics.jsonl.
"""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import torch

from data.dataset import open_dataset
from tests.bare_loop import write_metrics
from training.config import ROOT, PlainTrainConfig, parse
from training.distributed import rank, run, world_size
from training.errors import UserError

STEP = re.compile(r"iter (\d+): loss ([\d.]+|nan), time ([\d.]+)ms")
KEYS = """gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias learning_rate
    weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr compile"""  # the same in both


def main() -> None:
    cfg = parse(PlainTrainConfig, sys.argv[2:], "")
    checkout, dataset = Path(os.environ.get("NANOGPT", "")), open_dataset(ROOT / "data" / cfg.dataset)
    on_gpu = cfg.device != "cpu" and torch.cuda.is_available()
    if not (checkout / "configurator.py").is_file():
        raise UserError(f"NANOGPT={checkout}: is not a checkout of nanoGPT: it has no configurator.py")
    if dataset.dtype.itemsize != 2:
        raise UserError(f"nanoGPT reads 16-bit token ids; {dataset.path('train')} has {dataset.dtype}")
    if world_size() > 1 and not on_gpu:
        raise UserError("nanoGPT trains on CPUs in one process only; use --strategies=single")
    folder = Path(cfg.out_dir, f"nanogpt_{rank()}").resolve()
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}.bin").symlink_to(dataset.path(split).resolve())
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": cfg.model_config(dataset.vocab_size).vocab_size}))
    settings = {key: getattr(cfg, key) for key in KEYS.split()}
    settings |= {"dataset": folder, "out_dir": folder, "device": "cuda" if on_gpu else "cpu"}
    settings |= {"max_iters": cfg.steps - 1, "log_interval": 1, "eval_interval": 10**9, "eval_iters": 1}
    settings |= {"dtype": cfg.dtype} if cfg.dtype != "auto" else {}  # on GPUs its default is ours
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # no caches in the checkout
    if world_size() == 1:
        environment = {name: value for name, value in environment.items() if name != "RANK"}  # it would start DDP
    line = [sys.executable, "-u", "train.py", *(f"--{key}={value}" for key, value in settings.items())]
    steps = []
    with subprocess.Popen(line, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout or ():
            print(text, end="", flush=True)
            if match := STEP.match(text):
                steps.append((float(match[2]), float(match[3]), 0))
    if process.returncode or len(steps) < cfg.steps:
        raise UserError(f"nanoGPT ended with status {process.returncode} after {len(steps)} of {cfg.steps} steps")
    if rank() == 0:
        write_metrics(cfg, steps)


if __name__ == "__main__":
    run(main)
