"""Predicted beside measured: the memory of real runs on the CPU ranks of this machine.

    python -m training.plan.check results/plan_check --ranks=1,2,4 --strategies=ddp,zero1,zero2,zero3,fsdp

It writes check.json and check.md: the model state (all tensors that live), and the memory of a rank's process at its
fullest, each of the rank that has most. DDP on one rank is a single process. What a process holds beyond the formulas
is measured once for each strategy and number of ranks, with a model that is neither of those predicted. Rows that are
not asked for stay as they are there.

All of it with a malloc that gives back at once what is freed (MALLOC). Else glibc keeps some, another amount in each
run, which no formula has. A step is slower so, hence no times are taken here; those are compared over links that are
known: tests/cluster/plan_links.py.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from training import ending, run_folder
from training.benchmark import rows
from training.benchmark.strategies import of
from training.plan import calibrate, strategies
from training.plan.assumptions import ON_CPU, attribute, values
from training.plan.case import Case
from training.plan.footprint import footprint
from training.plan.shapes import Shape
from training.plan.strategies import STRATEGIES
from training.plan.system import System

MODELS = {
    "25M": (Shape("25M", 8, 8, 512, vocab_size=257, block_size=256, bias=False), 2),  # and sequences a micro-step
    "57M": (Shape("57M", 8, 12, 768, vocab_size=257, block_size=128, bias=False), 1),
}
SAMPLE = Shape("sample", 2, 8, 512, vocab_size=257, block_size=128, bias=False), 1
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # bytes from which on glibc maps memory, and unmaps it when it is freed
MICRO_STEPS = calibrate.MICRO_STEPS
PREDICTED = ("model_state", "peak_memory")
CHECKED = "ddp,zero1,zero2,zero3,fsdp"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("write", type=Path, help="folder for check.json and check.md")
    parser.add_argument("--ranks", default="1,2,4", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--strategies", default=CHECKED)
    parser.add_argument("--models", default=",".join(MODELS), type=lambda text: text.split(","), help=", ".join(MODELS))
    args = parser.parse_args()
    names = [strategy.name for strategy in strategies.named(args.strategies)]
    asked = {ranks: ["single" if ranks == 1 and name == "ddp" else name for name in names] for ranks in args.ranks}
    found, machines = others(args.write / "check.json", asked, args.models)
    with tempfile.TemporaryDirectory() as folder:
        calibrate.noise(Path(folder) / "data")
        for ranks, here in asked.items():
            held = {name: beyond(ranks, STRATEGIES[name], Path(folder)) for name in here}
            machine: Row = machines.setdefault(ranks, {"ranks": ranks, "baselines": {}})
            machine |= {"device": run_folder.processor(), "environment": MALLOC}
            machine["baselines"] |= held
            print(json.dumps(machine), flush=True)
            for model in args.models:
                for name in here:
                    found.append(compared(*MODELS[model], ranks, STRATEGIES[name], held, Path(folder)))
                    print(line(found[-1]), flush=True)
            found.sort(key=place)
            write(args.write, "check", found, [machines[ranks] for ranks in sorted(machines)])


def others(path: Path, asked: dict[int, list[str]], models: list[str]) -> tuple[list[Row], dict[int, Row]]:
    """What is there already: rows of another number of ranks, strategy, or model; machines by their number of ranks."""
    there = json.loads(path.read_text()) if path.exists() else {"rows": [], "machines": []}
    rows = [
        row for row in there["rows"] if row["model"] not in models or row["strategy"] not in asked.get(row["ranks"], ())
    ]
    return rows, {machine["ranks"]: machine for machine in there["machines"]}


def place(row: Row) -> tuple[int, int, int]:
    """Of a row in the table."""
    names = ["single", *CHECKED.split(",")]
    strategy = names.index(row["strategy"]) if row["strategy"] in names else len(names)
    return list(MODELS).index(row["model"]), row["ranks"], strategy


def system(ranks: int, baselines: dict[str, float]) -> System:
    """Of CPU ranks in fp32; how fast they are is in no formula of memory."""
    assumed: Row = {attribute(name): value for name, value in values({}).items()} | ON_CPU
    rates: Row = dict.fromkeys(("memory", "flops", "memory_rate", "node_link", "link"), 1.0)
    return System("CPU", "cpu", gpus=ranks, nodes=1, dtype=torch.float32, baselines=baselines, **rates, **assumed)


def beyond(ranks: int, strategy: strategies.Strategy, folder: Path) -> float:
    """Bytes that a rank's process holds besides those by the formulas."""
    shape, batch = SAMPLE
    case = Case(shape, strategy, system(ranks, {}))
    return measured(shape, batch, ranks, strategy, folder)[1] - calibrate.tensors(case, batch)


def compared(
    shape: Shape, batch: int, ranks: int, strategy: strategies.Strategy, baselines: dict[str, float], folder: Path
) -> Row:
    memory = footprint(Case(shape, strategy, system(ranks, baselines)), batch, False, MICRO_STEPS)
    sides = {"predicted": (memory.model_state(), memory.total())}
    sides["measured"] = measured(shape, batch, ranks, strategy, folder)
    row: Row = {"model": shape.name, "strategy": strategy.name, "ranks": ranks}
    return row | {side: dict(zip(PREDICTED, sizes, strict=True)) for side, sizes in sides.items()}


def measured(shape: Shape, batch: int, ranks: int, strategy: strategies.Strategy, folder: Path) -> tuple[float, float]:
    """Bytes of the tensors that live when backward is done, and of a process at its fullest; of the rank with most."""
    with tempfile.TemporaryDirectory(dir=folder) as notes:
        inside = ["benchmark.py", "--inside", "--training", notes, *of(strategy.name, ranks).script]
        settings = calibrate.settings(shape, batch, MICRO_STEPS * ranks, 1, "cpu", "float32")
        settings += [f"--dataset={folder / 'data'}", f"--out_dir={notes}/run"]
        calibrate.launch(ranks, *inside, *settings, environment=MALLOC)
        found = [json.loads((Path(notes) / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
    return max(sum(rows.held(note)) for note in found), max(note["peak_host_bytes"] for note in found)


def ratio(row: Row, what: str) -> float:
    return row["predicted"][what] / row["measured"][what]


def line(row: Row) -> str:
    """Of a Markdown table: MB, MB, ms; of each predicted, measured, the ratio."""
    cells = [row["model"], row["strategy"], str(row["ranks"])]
    for what in row["measured"]:
        unit = 1e3 if what == "step" else 1e-6
        cells += [f"{unit * row[side][what]:,.1f}" for side in ("predicted", "measured")] + [f"{ratio(row, what):.2f}"]
    return f"| {' | '.join(cells)} |"


def write(folder: Path, name: str, found: list[Row], machines: list[Row]) -> None:
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
