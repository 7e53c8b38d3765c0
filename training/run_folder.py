"""The run folder: what the run was told (config.json), what it ran on (environment.json), and room for what it did."""

import dataclasses
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from training import memory
from training.distributed import Ranks
from training.files import write_text
from training.machine import ROOT
from training.origin import Origin
from training.train_config import TrainConfig

CONTENTS = (
    "latest",
    "best",
    "config.json",
    "deepspeed.json",
    "deepspeed.log",
    "environment.json",
    "metrics.jsonl",
    "speed.json",
    "loss.png",
    "checkpoints",
    "hang",
    memory.NOTE,
    "wandb",
    "wandb_id",
)


def prepare(cfg: TrainConfig, ranks: Ranks, origin: Origin, deepspeed: dict[str, Any] | None = None) -> Path:
    """Make the folder ready; a run that starts anew where another was moves that one into previous/.

    deepspeed: what DeepSpeed is given, for deepspeed.json. Nothing is written by a run that only evaluates.
    """
    folder = Path(cfg.out_dir)
    if cfg.eval_only:
        return folder
    with ranks.together():
        if ranks.main:
            folder.mkdir(parents=True, exist_ok=True)
            if not origin.checkpoint:
                move_aside(folder)
            (folder / memory.NOTE).unlink(missing_ok=True)
            write_text(folder / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1))
            write_text(folder / "environment.json", json.dumps(environment(ranks), indent=1))
            if deepspeed:
                write_text(folder / "deepspeed.json", json.dumps(deepspeed, indent=1))
    return folder


def move_aside(folder: Path) -> None:
    """Nothing saved is lost: not to a command that was typed twice either. A run without a checkpoint is no loss."""
    if any((folder / "checkpoints").glob("step_*")):
        previous = folder / "previous" / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 10**6 % 1000:03d}"
        previous.mkdir(parents=True)
        for name in CONTENTS:
            if (folder / name).exists():
                (folder / name).rename(previous / name)
        print(f"the run that {folder} held was moved to {previous}", flush=True)
    else:
        (folder / "metrics.jsonl").unlink(missing_ok=True)


def environment(ranks: Ranks) -> dict:
    """Code, versions and devices: what a number in metrics.jsonl was measured with."""
    cuda = ranks.device.type == "cuda"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [sys.argv[0].removeprefix(f"{ROOT}/"), *sys.argv[1:]],  # python -m makes it a whole path
        "git_commit": git("rev-parse", "HEAD") or None,
        "git_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed") if find_spec("deepspeed") else None,
        "device": torch.cuda.get_device_name(ranks.device) if cuda else processor(),
        "world_size": ranks.world_size,
        "threads_per_rank": torch.get_num_threads(),
    }


def git(*arguments: str) -> str:
    """What git says of this code; nothing where there is no git, or no repository."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        return names[0] if names else platform.machine()
    return platform.processor() or platform.machine()
