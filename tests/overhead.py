"""Step time beside a loop with nothing around it: both in one process, in turn, on the same model.

    python -m tests.overhead results/bare_124m config/train_gpt2.py --device=cpu ...

Two launches of one loop differ by several percent on a shared machine; two steps of one process, one after the other,
do not. A step of ours is all that training/loop.py does: the step, requests to stop, metrics. The bare one is that of
tests/bare_loop.py. Each is timed from a barrier to a barrier. Writes overhead.json.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist

import train
import train_deepspeed
from tests.bare_loop import deepspeed_step, make_batch, plain_step
from tests.running import ROOT, zero_json
from training import distributed, loop
from training.distributed import SINGLE_PROCESS
from training.metrics import Metrics
from training.run_control import RunControl
from training.run_folder import environment

STRATEGIES = ("single", "ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
PAIRS, WARM_UP = 48, 4
RESULT = "pairs.json"


def alternate(cfg: Any, ranks: Any, batches: Any, trainer: Any, checkpoints: Any, init: Any) -> None:
    """Takes the place of training.loop.train."""
    metrics = Metrics(cfg, ranks, batches, init, trainer.dtype)
    control = RunControl(cfg, ranks, checkpoints, trainer.dtype)
    batch = make_batch(cfg, batches.dataset, ranks)

    def ours(step: int) -> None:
        step_metrics = trainer.train_step(step)
        control.step_done(step, step_metrics["loss"], step_metrics["grad_norm"])
        metrics.count_step()
        metrics.log_step(step, step_metrics)

    def bare(step: int) -> None:
        if hasattr(trainer, "engine"):
            loss = deepspeed_step(trainer.engine, cfg, ranks, batch)
        else:
            model, autocast = trainer.ddp or trainer.model, trainer.autocast
            loss = plain_step(model, trainer.optimizer, autocast, cfg, ranks, batch)
        value = loss.item()
        if ranks.main:
            print(f"iter {step}: loss {value:.4f}", flush=True)

    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for step in range(2 * (PAIRS + WARM_UP)):
        name, function = (("ours", ours), ("bare", bare))[(step + step // 2) % 2]  # ours first in every second pair
        barrier(ranks)
        since = time.perf_counter()
        function(step)
        barrier(ranks)
        times[name].append(time.perf_counter() - since)
    if ranks.main:
        Path(cfg.out_dir, RESULT).write_text(json.dumps({name: one[WARM_UP:] for name, one in times.items()}))


def barrier(ranks: Any) -> None:
    if ranks.world_size > 1:
        dist.barrier()


def run_strategy(name: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    own = [f"--strategy={name}"] if name in ("ddp", "fsdp") else []
    own = [f"--deepspeed_config={zero_json(name)}"] if name.startswith("zero") else own
    launcher = [] if name == "single" else ["-m", "launch.ranks", "2"]
    script = "train_deepspeed" if name.startswith("zero") else "train"
    line = [sys.executable, *launcher, "-m", "tests.overhead", f"--script={script}", *arguments, *own]
    subprocess.run([*line, f"--out_dir={folder}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    times = json.loads((folder / RESULT).read_text())
    ratios = [a / b for a, b in zip(times["ours"], times["bare"], strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    medians = {f"{name}_ms": 1e3 * median(one) for name, one in times.items()}
    return {"ratio": middle, "ratio_quartiles": [low, high], **medians, "pairs": len(ratios)}


def main() -> None:
    if sys.argv[1].startswith("--script="):
        script: Any = {"train": train, "train_deepspeed": train_deepspeed}[sys.argv.pop(1).partition("=")[2]]
        loop.train = alternate
        distributed.run(script.main)
    target, *arguments = sys.argv[1:]
    path, results, chosen = Path(target, "overhead.json"), {}, list(STRATEGIES)
    if arguments[0].startswith("--only="):  # measure these again
        chosen, results = arguments.pop(0).partition("=")[2].split(","), json.loads(path.read_text())["results"]
    for name in chosen:
        results[name] = run_strategy(name, arguments, Path(target, "runs", name))
        print(name, results[name], flush=True)
    about = {"environment": environment(SINGLE_PROCESS), "arguments": arguments, "threads": torch.get_num_threads()}
    path.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
