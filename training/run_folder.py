"""The run folder: the settings (config.json), the environment (environment.json), and room for the results."""

import dataclasses
import fcntl
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch

from model import GPTConfig
from training.batches import Batches
from training.checkpoint import write_text
from training.config import ROOT, TrainConfig
from training.distributed import Ranks
from training.errors import RankError, UserError
from training.init import InitState

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # torch's, on GPUs and CPUs
TESTED_TORCH = (2, 11), (2, 14)  # oldest and newest
OUT_OF_MEMORY_FILE = "out_of_memory.txt"
PATHS = ("out_dir", "dataset", "deepspeed_config", "nvme_path")  # settings that may differ between hosts
LOCKS: list[IO[str]] = []  # closed when the process ends
CONTENTS = (
    *("latest", "best", "config.json", "deepspeed.json", "deepspeed.log", "environment.json", "metrics.jsonl"),
    *("speed.json", "loss.png", "checkpoints", "hang", OUT_OF_MEMORY_FILE, "wandb", "wandb_id", "tensorboard"),
)


def agree(cfg: TrainConfig, ranks: Ranks, batches: Batches, deepspeed: dict[str, Any] | None = None) -> None:
    """Raise UserError on all ranks where one of them has other code, packages, settings or data. A collective."""
    folders = (ROOT, ROOT / "training", ROOT / "data")
    code = b"".join(path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py")))
    facts: dict[str, Any] = {f"version of {name}": value for name, value in versions().items()}
    facts["version of the code"] = f"CRC-32 {zlib.crc32(code):08x}"
    facts |= {name: value for name, value in dataclasses.asdict(cfg).items() if name not in PATHS}
    facts |= {f"{name} in the DeepSpeed JSON": value for name, value in (deepspeed or {}).items()}
    ranks.agree(facts | batches.describe())


def prepare(cfg: TrainConfig, ranks: Ranks, init: InitState, deepspeed: dict[str, Any] | None = None) -> None:
    """Create the folder; a new run moves an earlier run's files to previous/. A collective."""
    folder = Path(cfg.out_dir)
    with ranks.together():
        if ranks.main and not cfg.eval_only:
            if not TESTED_TORCH[0] <= tuple(map(int, torch.__version__.split(".")[:2])) <= TESTED_TORCH[1]:
                print(f"warning: torch {torch.__version__} is untested; requirements.txt has the versions that work")
            if cfg.wandb_log or cfg.tensorboard:
                from training import trackers  # only here, as W&B's import takes a third of a second

                trackers.check(cfg)
            folder.mkdir(parents=True, exist_ok=True)
            LOCKS.append(lock(folder / "lock"))
            if not init.checkpoint:
                move_aside(folder)
            (folder / OUT_OF_MEMORY_FILE).unlink(missing_ok=True)
            write_text(folder / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1))
            write_text(folder / "environment.json", json.dumps(environment(ranks), indent=1))
            if deepspeed:
                write_text(folder / "deepspeed.json", json.dumps(deepspeed, indent=1))


def lock(path: Path) -> IO[str]:
    """Lock the run folder, until the file is closed. Raises UserError where another run has it."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = f"in use by {file.read().strip()}"
        raise UserError(f"out_dir = {str(path.parent)!r}: {holder}; stop that run, or set another --out_dir") from None
    except OSError:  # a file system without locks
        pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def move_aside(folder: Path) -> None:
    """Keep an earlier run, so that a command typed twice loses nothing. A run without a checkpoint is not kept."""
    if any((folder / "checkpoints").glob("step_*")):
        previous = folder / "previous" / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 10**6 % 1000:03d}"
        previous.mkdir(parents=True)
        for name in CONTENTS:
            if (folder / name).exists():
                (folder / name).rename(previous / name)
        print(f"moved the earlier run in {folder} to {previous}", flush=True)
    else:
        (folder / "metrics.jsonl").unlink(missing_ok=True)


def environment(ranks: Ranks) -> dict[str, Any]:
    """Code, versions and devices that the numbers in metrics.jsonl were measured with."""
    commit = ""  # without git, or outside of a repository
    if shutil.which("git"):
        line = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(line, capture_output=True, text=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    processors = re.findall("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    on_gpu, processor = ranks.device.type == "cuda", next(iter(processors), platform.machine())
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [sys.argv[0].removeprefix(f"{ROOT}/"), *sys.argv[1:]],  # python -m puts a full path there
        "git_commit": commit.removesuffix("-dirty") or None,
        "git_changes": commit.endswith("-dirty"),
        **versions(),
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else processor,
        "world_size": ranks.world_size,
        "threads_per_rank": torch.get_num_threads(),
    }


def versions() -> dict[str, str | None]:
    deepspeed = version("deepspeed") if find_spec("deepspeed") else None
    return {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": deepspeed}


@contextmanager
def explain_out_of_memory(
    cfg: TrainConfig, ranks: Ranks, model: GPTConfig, strategy: str, dtype: torch.dtype
) -> Iterator[None]:
    """Wrap everything that allocates: out of memory becomes a RankError that says what uses it and what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's; Python's and NumPy's
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        from training.strategies import out_of_memory_advice

        reason = f"rank {ranks.rank}: {(str(error) or 'out of memory').splitlines()[0]}"
        advice = out_of_memory_advice(cfg, ranks, model, strategy, dtype, reason)
        note = Path(cfg.out_dir) / OUT_OF_MEMORY_FILE
        try:  # ranks often run out at the same step: the first to write the note reports; an evaluation writes none
            if not cfg.eval_only:
                with note.open("x") as file:
                    file.write(advice)
        except FileExistsError:
            advice = ""
        except OSError:  # the disk is full, too
            pass
        raise RankError(advice) from None
