"""Tokens that config/train_speedrun.py needs for the loss that config/train_gpt2.py reaches, at one size and budget.

    python -m tests.speedrun results/speedrun
    python -m tests.speedrun /tmp/tried --seeds=1 --recipes=gpt2 --learning_rates=5e-4,1e-3,2e-3

10M parameters on a CPU, on the bytes of Python's documentation. Each run has one core; --jobs run at once.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tests.running import ROOT, rows
from training.distributed import SINGLE_PROCESS
from training.figures import line_style, new_figure, style_axes
from training.run_folder import environment

RECIPES = {"gpt2": "config/train_gpt2.py", "speedrun": "config/train_speedrun.py"}
SAME = {  # for both: data, size, batch, budget
    **{"dataset": "python_docs", "device": "cpu", "compile": False, "dtype": "float32", "log_interval": 10},
    **{"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 8},
    **{"gradient_accumulation_steps": 1, "eval_iters": 8, "always_save_checkpoint": False, "beta2": 0.99},
}
# Better here than 2e-3 (validation loss after 110 steps: 2.50, 2.62). The recipe's own is for 0.5M tokens a step.
RATES = {"gpt2": {"learning_rate": 1e-3, "min_lr": 1e-4}}
COLUMNS = ("seed", "val loss, GPT-2's recipe", "val loss, speedrun", "tokens for GPT-2's loss", "share")


def train(folder: Path, recipe: str, seed: int, args: argparse.Namespace, **settings: Any) -> list[tuple[int, float]]:
    """(tokens, validation loss) of every evaluation."""
    own = {**SAME, "seed": seed, "out_dir": folder, "max_iters": args.steps, "lr_decay_iters": args.steps}
    own |= {"warmup_iters": args.steps // 20, "eval_interval": max(1, args.steps // 20), **settings}
    words = [f"--{name}={value}" for name, value in own.items()]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "train.py", RECIPES[recipe], *words]
    subprocess.run(line, cwd=ROOT, env=environ, check=True, stdout=subprocess.DEVNULL)
    tokens = own["gradient_accumulation_steps"] * own["batch_size"] * own["block_size"]
    return [(row["step"] * tokens, row["val_loss"]) for row in rows(folder, "eval")]


def tokens_to_reach(loss: float, curve: list[tuple[int, float]]) -> float:
    """Where the curve first falls to the loss, on the line between two evaluations; inf if it never does."""
    for (before, high), (after, low) in pairwise(curve):
        if low <= loss:
            return after - (after - before) * max(0.0, (loss - low) / (high - low))
    return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("write", type=Path, help="folder of the result")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--recipes", default="gpt2,speedrun")
    parser.add_argument("--learning_rates", default="", help="of AdamW, each tried; min_lr is a tenth of it for gpt2")
    args = parser.parse_args()
    args.write.mkdir(parents=True, exist_ok=True)
    runs = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in range(args.seeds):
            for recipe in args.recipes.split(","):
                for rate in args.learning_rates.split(","):
                    own = {"learning_rate": float(rate)} if rate else RATES.get(recipe, {})
                    own |= {"min_lr": float(rate) / 10} if rate and recipe == "gpt2" else {}
                    name = "-".join(filter(None, [recipe, str(seed), rate]))
                    runs[name] = pool.submit(train, args.write / name, recipe, seed, args, **own)
        curves = {name: run.result() for name, run in runs.items()}
    for name, curve in curves.items():
        print(f"{name}: val loss {curve[-1][1]:.4f} after {curve[-1][0]:,} tokens")
    if args.recipes == "gpt2,speedrun" and not args.learning_rates:
        report(args, curves)


def report(args: argparse.Namespace, curves: dict[str, list[tuple[int, float]]]) -> None:
    lines, shares = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"], []
    figure = new_figure(8, 5)
    axes = figure.add_subplot(xlabel="tokens", ylabel="validation loss (nats per byte)")
    for seed in range(args.seeds):
        theirs, ours = curves[f"gpt2-{seed}"], curves[f"speedrun-{seed}"]
        needed = tokens_to_reach(theirs[-1][1], ours)
        shares.append(needed / theirs[-1][0])
        lines.append(f"| {seed} | {theirs[-1][1]:.4f} | {ours[-1][1]:.4f} | {needed:,.0f} | {shares[-1]:.2f} |")
        for number, (label, curve) in enumerate({"GPT-2's recipe": theirs, "speedrun": ours}.items()):
            axes.plot(*zip(*curve[1:], strict=True), **line_style(number), label=None if seed else label)
    style_axes(axes)
    axes.legend(frameon=False)
    figure.savefig(args.write / "loss.png")
    tokens = curves["gpt2-0"][-1][0]
    text = f"{args.steps} steps, {tokens:,} tokens; median share {median(shares):.2f}"
    (args.write / "README.md").write_text(f"# Speedrun\n\n{text}\n\n" + "\n".join(lines) + "\n")
    about = {"environment": environment(SINGLE_PROCESS), "settings": SAME, "steps": args.steps, "curves": curves}
    (args.write / "speedrun.json").write_text(json.dumps(about, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
