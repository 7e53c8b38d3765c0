"""--calibrate: this machine, measured by real ranks, into a file that --machine reads.

What a device does, each rank measures by itself (probe.py). What a strategy costs besides, the memory of its process
and the time of its Python, is what short runs of a small model take beyond the formulas.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from data.tokenizer import ByteTokenizer
from data.writer import Writer
from training.benchmark.strategies import of
from training.errors import UserError
from training.machine import ROOT
from training.plan import probe, request
from training.plan.case import Case
from training.plan.footprint import footprint
from training.plan.machine_file import Measured
from training.plan.shapes import Shape
from training.plan.strategies import STRATEGIES
from training.plan.timing import timing

DEFAULT = Shape("gpt2, shorter", 12, 12, 768, block_size=256, bias=False)
RUN = ("zero0", "zero1", "zero2", "zero3", "fsdp")  # besides train.py's own; their variants are like them
STEPS, MICRO_STEPS = 8, 2
BATCH = 4  # sequences of the model that is timed


def run(args: argparse.Namespace) -> None:
    """Measure and write; or, as a rank of it, measure."""
    asked = args.model is not None or args.parameters is not None or any((args.n_layer, args.n_head, args.n_embd))
    shape = request.shape(args) if asked else DEFAULT
    batch, dtype = args.batch_size or BATCH, args.dtype or "auto"
    if args.probe:
        probe.run(args.probe, dtype, shape, batch)
        return
    target = Path(args.calibrate)
    if not target.parent.is_dir() or target.is_dir():
        raise UserError(f"calibrate = {args.calibrate!r}: must be a file in a folder that is there")
    found = measure(request.above("gpus", args.gpus, 1024), shape, batch, dtype)
    found.write(target)
    print(f"{target}: {said(found)}")


def measure(ranks: int, shape: Shape, batch: int, dtype: str) -> Measured:
    """batch: sequences of the model that is timed, which is a part of shape."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tell(f"measuring {ranks} ranks at once: matmul, memory, AdamW, a model, all-reduce")
        numbers = probed(ranks, shape, batch, dtype, folder / "probe.json")
        outside, model = numbers.pop("outside"), probe.sample(shape)
        alone = batch * model.block_size * model.flops_per_token() / numbers.pop("sample")  # seconds of a micro-step
        about: dict[str, Any] = {"n_embd": shape.n_embd, "block_size": shape.block_size}
        found = Measured(**numbers, **about, baselines={}, overheads={})
        noise(folder / "data")
        runs = {}
        for strategy in ("ddp" if ranks > 1 else "single", *RUN):
            tell(f"a short run of {strategy}")
            runs[strategy] = short_run(ranks, strategy, found, model, batch, folder)
    tell("")
    return fitted(found, model, batch, runs, alone, outside)


def fitted(
    found: Measured, model: Shape, batch: int, runs: dict[str, tuple[float, float]], alone: float, outside: float
) -> Measured:
    """model: the sample; runs: its peak memory, and seconds of its step, by strategy.

    alone: seconds of its computing in a micro-step; outside: bytes that a process holds of a GPU besides torch's.

    What a CPU rank holds beyond the formulas is Python with its libraries, which is the same for every model, and what
    glibc's malloc keeps of freed memory, which is not: of a larger model it may be more. torch's peak has none of it.
    """
    baselines, overheads = {}, {}
    system = found.system({"gpus": found.ranks, "nodes": 1, "link": 1e12}, "")
    for strategy, (peak, seconds) in runs.items():
        case = Case(model, STRATEGIES[strategy], system)
        baselines[strategy] = outside or max(0.0, peak - tensors(case, batch))
        time = timing(case, batch, False, MICRO_STEPS)
        besides = seconds - (time.communication + time.update + MICRO_STEPS * alone)
        overheads[strategy] = max(0.0, besides) / (MICRO_STEPS * (model.n_layer + 1))
    return replace(found, baselines=baselines, overheads=overheads)


def tensors(case: Case, batch: int) -> float:
    """Bytes by the formulas alone, of a short run."""
    found = footprint(case, batch, False, MICRO_STEPS)
    return found.total() - found.baseline - found.fragmentation


def short_run(
    ranks: int, strategy: str, found: Measured, model: Shape, batch: int, folder: Path
) -> tuple[float, float]:
    """Peak memory of a rank in bytes, and the median step in seconds."""
    own, out_dir = settings(model, batch, MICRO_STEPS * ranks, STEPS, found.kind, found.dtype), folder / strategy
    launch(ranks, *of(strategy, ranks).script, *own, f"--dataset={folder / 'data'}", f"--out_dir={out_dir}")
    return seen(out_dir)


def probed(ranks: int, shape: Shape, batch: int, dtype: str, note: Path) -> dict[str, Any]:
    names = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    options = [f"--{name}={getattr(shape, name)}" for name in names]
    launch(
        ranks,
        "plan.py",
        f"--probe={note}",
        f"--batch_size={batch}",
        *([] if dtype == "auto" else [f"--dtype={dtype}"]),
        *options,
    )
    return json.loads(note.read_text())


def noise(folder: Path) -> None:
    with Writer(folder, ByteTokenizer(), "noise") as writer:
        for split in ("train", "val"):
            writer.write(split, np.arange(2**16) % 256)


def seen(out_dir: Path) -> tuple[float, float]:
    """Peak memory of a rank in bytes, and the median step in seconds."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    timed = [row for row in rows if row["kind"] == "train" and row["step_ms"]]
    return max(row["peak_memory_bytes"] for row in timed), median(row["step_ms"] for row in timed) / 1e3


def settings(shape: Shape, batch: int, accumulation: int, steps: int, kind: str, dtype: str) -> list[str]:
    """accumulation: micro-steps of all ranks."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")
    step = {"batch_size": batch, "gradient_accumulation_steps": accumulation, "max_iters": steps, "log_interval": 1}
    quiet = {"eval_interval": 10**6, "eval_iters": 1, "always_save_checkpoint": False, "compile": False}
    values = {name: getattr(shape, name) for name in names} | step | quiet | {"device": kind, "dtype": dtype}
    return [f"--{name}={value}" for name, value in values.items()]


def launch(ranks: int, *command: str, environment: Mapping[str, str] | None = None) -> None:
    """environment: variables besides this process' own. UserError with what the ranks said where they failed."""
    more = ["env", *(f"{name}={value}" for name, value in environment.items())] if environment else []
    done = subprocess.run(
        [*more, sys.executable, "launch.py", str(ranks), *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(
            f"{command[0]} on {ranks} ranks: {(done.stderr or done.stdout).strip().removeprefix('error: ')}"
        )


def said(found: Measured) -> str:
    return (
        f"{found.ranks} x {found.device}, {found.dtype}: {found.flops / 1e12:,.3g} TFLOP/s in matmuls, "
        f"{found.achievable:.0%} of it in a model of width {found.n_embd}; memory {found.memory_rate / 1e9:,.3g} GB/s; "
        f"AdamW {found.update_rate / 1e9:,.3g} GB/s; all-reduce {8e-9 * found.link:,.3g} Gbit/s"
    )


def tell(text: str) -> None:
    """What takes a while, on a line that goes away."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
