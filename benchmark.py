"""Strategies side by side: the same model, data and global batch; loss, step time, memory of the model state.

    python benchmark.py --strategies=ddp,zero1,zero2,zero3 --ranks=2 --steps=30 config/train_debug.py --dtype=bfloat16
    python benchmark.py --strategies=ddp,zero2 --ranks=4 --memory --write=results/memory config/train_debug.py

Each is a real launch of its own; they take turns, --rounds times. What is no option here goes to the train scripts.
The first strategy is what the others are compared with, round by round; a table shows the median of the rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training import ending, hostfile
from training.errors import UserError

PLAIN = ("single", "ddp")


def launch(
    strategy: str, launcher: list[str], out_dir: Path, arguments: list[str], last: str = "", before: tuple = ()
) -> float:
    """Run it, to its end or to a line that begins with `last`; the seconds from its start to its first step's end."""
    script = ["train.py"]
    if strategy not in PLAIN:
        script = ["train_deepspeed.py", f"--deepspeed_config=deepspeed_configs/{strategy}_config.json"]
    if strategy in PLAIN:  # which do not know DeepSpeed's keys
        arguments = [argument for argument in arguments if not argument.startswith("--nvme_path")]
    launcher = ["launch.py", "1"] if strategy == "single" else launcher
    command = [sys.executable, *launcher, *before, *script, *arguments, f"--out_dir={out_dir}"]
    started, first, said = time.perf_counter(), 0.0, []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout or ():
        said.append(line)
        if line.startswith("step 0: loss"):
            first = time.perf_counter() - started
        if last and line.startswith(last):
            process.terminate()  # what it would save is of no use here
            process.wait()
            return first
    if process.wait():
        raise UserError(f"{strategy} ended with status {process.returncode}:\n{''.join(said[-20:])}")
    return first


def metrics(out_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def measure(args: argparse.Namespace, arguments: list[str], folder: Path) -> list[dict[str, Any]]:
    """One row a strategy, the rounds together."""
    steps = [
        f"--max_iters={args.steps}",
        "--always_save_checkpoint=False",
        "--log_interval=1",
        "--eval_interval=1000000",
        "--eval_iters=2",
    ]
    runs: dict[str, list[list[dict[str, Any]]]] = {s: [] for s in args.strategies}
    starts: dict[str, list[float]] = {s: [] for s in args.strategies}
    for number in range(args.rounds):
        for strategy in args.strategies:
            out_dir = folder / f"{strategy}-{number}"
            print(f"round {number + 1} of {args.rounds}: {strategy}", flush=True)
            last = f"step {args.steps - 1}: loss"
            starts[strategy].append(launch(strategy, args.launcher, out_dir, [*arguments, *steps], last))
            runs[strategy].append(metrics(out_dir))
    base = runs[args.strategies[0]][0]
    rows = []
    for strategy in args.strategies:
        of_rounds = [[row["step_ms"] for row in run if row["step_ms"]] for run in runs[strategy]]
        times = [time for run in of_rounds for time in run]
        pairs = list(zip(base, runs[strategy][0], strict=True))
        row = {"strategy": strategy, "ranks": 1 if strategy == "single" else args.ranks, "step_ms": median(times)}
        row |= {"fastest_ms": round(min(times), 1), "slowest_ms": round(max(times), 1)}
        row |= {"steps_timed": len(times), "start_s": median(starts[strategy])}
        row |= {f"{k}_difference": max(abs(a[k] - b[k]) for a, b in pairs) for k in ("loss", "grad_norm")}
        row["rounds_ms"] = [median(run) for run in of_rounds]
        rows.append(row)
        # round by round, as other work on the machine comes and goes
        ratios = [a / b for a, b in zip(rows[0]["rounds_ms"], row["rounds_ms"], strict=True)]
        row["steps_per_second_ratio"] = round(statistics.median(ratios), 3)
        if args.memory:
            note = folder / f"{strategy}.json"
            before = ("census.py", str(note))
            launch(strategy, args.launcher, folder / "census", arguments, before=before)
            row |= json.loads(note.read_text())
            row["measured_to_expected"] = round(row["model_state_bytes"] / row["expected_bytes"], 3)
    return rows


def median(values: list[float]) -> float:
    return round(statistics.median(values), 1)


COLUMNS = {
    "strategy": "strategy",
    "ranks": "ranks",
    "loss_difference": "largest difference of loss",
    "grad_norm_difference": "of gradient norm",
    "step_ms": "step, ms",
    "steps_per_second_ratio": "steps/s, ratio",
    "start_s": "start to first step, s",
    "model_state_bytes": "model state per rank, MB",
    "expected_bytes": "by the ZeRO paper's formula, MB",
    "measured_to_expected": "ratio",
    "buffer_bytes": "communication buffers, MB",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; numbers as people read them."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [[COLUMNS[name] for name in names], ["---"] * len(names)]
    for row in rows:
        cells = []
        for name in names:
            value = row.get(name, "")
            value = f"{value / 1e6:,.1f}" if name.endswith("bytes") else value
            cells.append(f"{value:.1e}" if name.endswith("difference") else str(value))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", required=True, type=lambda text: text.split(","), help="single, ddp, zero0 ...")
    parser.add_argument("--ranks", type=int, default=2, help="of each, but for single")
    parser.add_argument("--hostfile", help="instead of --ranks: on these hosts, which share this folder")
    parser.add_argument("--ssh", default="ssh", help="with its options, for --hostfile")
    parser.add_argument("--steps", type=int, default=30, help="of each run; the first three are not timed")
    parser.add_argument("--rounds", type=int, default=1, help="how often the strategies take turns")
    parser.add_argument("--memory", action="store_true", help="measure the model state as well")
    parser.add_argument("--write", type=Path, help="folder for benchmark.json and benchmark.md")
    args, arguments = parser.parse_known_args()
    unknown = [s for s in args.strategies if s not in PLAIN and not Path(f"deepspeed_configs/{s}_config.json").exists()]
    if args.steps < 5:
        raise UserError(f"steps = {args.steps}: must be 5 or more, as the first three are not timed")
    if unknown:
        raise UserError(f"strategies: {', '.join(unknown)}: unknown; take single, ddp or a name of deepspeed_configs/")
    args.launcher = ["launch.py", str(args.ranks)]
    if args.hostfile:
        args.launcher = ["launch_hosts.py", f"--hostfile={args.hostfile}", f"--ssh={args.ssh}"]
        args.ranks = sum(len(host.slots) for host in hostfile.read(args.hostfile))
    with tempfile.TemporaryDirectory(dir=Path.cwd() if args.hostfile else None) as folder:  # hosts share this one
        rows = measure(args, arguments, Path(folder))
        environment = json.loads((Path(folder) / f"{args.strategies[0]}-0" / "environment.json").read_text())
    print("\n" + table(rows))
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
        about = {"arguments": arguments, "environment": environment, "rows": rows}
        (args.write / "benchmark.json").write_text(json.dumps(about, indent=1) + "\n")
        (args.write / "benchmark.md").write_text(table(rows))


if __name__ == "__main__":
    ending.run(main)
