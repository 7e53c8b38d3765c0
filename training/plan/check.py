"""Predicted beside measured: real runs on the CPU ranks of this machine, after a calibration for each.

    python -m training.plan.check results/plan_check --ranks=1,2,4 --strategies=ddp,zero1,zero2,zero3

It writes check.json and check.md: the model state (all tensors that live), and the memory of a rank at its fullest. DDP
on one rank is a single process. Times are compared over links that are known: tests/cluster/plan_links.py.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from training import ending
from training.benchmark import rows
from training.benchmark.strategies import of
from training.plan import calibrate, strategies
from training.plan.case import Case
from training.plan.footprint import footprint
from training.plan.machine_file import Measured
from training.plan.shapes import Shape

MODELS = {
    "11M": (Shape("11M", 6, 6, 384, vocab_size=257, block_size=128, bias=False), 4),  # and sequences a micro-step
    "25M": (Shape("25M", 8, 8, 512, vocab_size=257, block_size=256, bias=False), 2),
}
STEPS, MICRO_STEPS = 12, 2
PREDICTED = ("model_state", "peak_memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("write", type=Path, help="folder for check.json and check.md")
    parser.add_argument("--ranks", default="1,2,4", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--strategies", default="ddp,zero0,zero1,zero2,zero3")
    parser.add_argument("--models", default=",".join(MODELS), type=lambda text: text.split(","), help="11M, 25M")
    args = parser.parse_args()
    found, machines = [], []
    for name in args.models:
        shape, batch = MODELS[name]
        for ranks in args.ranks:
            machine = calibrate.measure(ranks, shape, batch, "float32")
            machines.append({"model": name, **vars(machine)})
            for strategy in strategies.named(args.strategies):
                found.append(compared(shape, batch, ranks, strategy, machine))
                print(line(found[-1]), flush=True)
    write(args.write, "check", found, machines)


def compared(shape: Shape, batch: int, ranks: int, strategy: strategies.Strategy, machine: Measured) -> dict[str, Any]:
    if ranks == 1 and strategy.name == "ddp":
        strategy = strategies.STRATEGIES["single"]
    case = Case(shape, strategy, machine.system({"gpus": ranks, "nodes": 1, "link": 1e12}, ""))
    memory = footprint(case, batch, False)
    row: dict[str, Any] = {"model": shape.name, "strategy": strategy.name, "ranks": ranks}
    row |= {"predicted": dict(zip(PREDICTED, (memory.model_state(), memory.total()), strict=True))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibrate.noise(folder / "data")
        own = calibrate.settings(shape, batch, MICRO_STEPS * ranks, STEPS, machine.kind, machine.dtype)
        own = [*of(strategy.name, ranks).script, *own, f"--dataset={folder / 'data'}"]
        calibrate.launch(ranks, *own, f"--out_dir={folder / 'run'}")
        peak, _ = calibrate.seen(folder / "run")
        inside = ["benchmark.py", "--inside", "--memory", str(folder)]
        calibrate.launch(ranks, *inside, *own, f"--out_dir={folder / 'counted'}")
        held = [sum(rows.held(json.loads((folder / f"rank_{rank}.json").read_text()))) for rank in range(ranks)]
    return row | {"measured": dict(zip(PREDICTED, (max(held), peak), strict=True))}


def ratio(row: dict[str, Any], what: str) -> float:
    return row["predicted"][what] / row["measured"][what]


def line(row: dict[str, Any]) -> str:
    """Of a Markdown table: MB, MB, ms; of each predicted, measured, the ratio."""
    cells = [row["model"], row["strategy"], str(row["ranks"])]
    for what in row["measured"]:
        unit = 1e3 if what == "step" else 1e-6
        cells += [f"{unit * row[side][what]:,.1f}" for side in ("predicted", "measured")] + [f"{ratio(row, what):.2f}"]
    return f"| {' | '.join(cells)} |"


def write(folder: Path, name: str, found: list[dict[str, Any]], machines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    titles = {"model_state": "model state, MB", "peak_memory": "memory at its fullest, MB", "step": "step, ms"}
    head = ["model", "strategy", "ranks"]
    for what in found[0]["measured"]:
        head += [f"{titles[what]}, predicted", "measured", "ratio"]
    text = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |", *map(line, found)]
    (folder / f"{name}.md").write_text("\n".join(text) + "\n")
    (folder / f"{name}.json").write_text(json.dumps({"machines": machines, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    ending.run(main)
