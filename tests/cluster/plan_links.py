"""Predicted beside measured over links of several speeds, between two hosts that are network namespaces of one machine.

    python -m tests.cluster.plan_links results/plan_check

Calibration and runs take turns, as the machine may be faster now and slower then; of each the median is written.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tests.cluster import Cluster
from tests.running import ROOT
from training.plan import calibrate
from training.plan.case import Case
from training.plan.check import line, write
from training.plan.shapes import Shape
from training.plan.strategies import named
from training.plan.timing import timing
from training.units import rate

RATES = ("10Gbit", "1Gbit")
SHAPE, BATCH = Shape("11M", 6, 6, 384, vocab_size=257, block_size=128, bias=False), 4
STRATEGIES = "ddp,zero2,zero3"
ROUNDS, STEPS = 3, 12


def main(target: Path) -> None:
    machines, rounds = [], []
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), 2) as cluster:
        calibrate.noise(Path(folder) / "data")
        for _ in range(ROUNDS):
            machines.append(calibrate.measure(2, SHAPE, BATCH, "float32"))
            rounds.append([row for speed in RATES for row in of_link(cluster, Path(folder), speed, machines[-1])])
            print(*map(line, rounds[-1]), sep="\n", flush=True)
    rows = [middle(list(same)) for same in zip(*rounds, strict=True)]
    print(*map(line, rows), sep="\n")
    write(target, "links", rows, [vars(machine) for machine in machines])


def of_link(cluster: Cluster, folder: Path, speed: str, machine: calibrate.Measured) -> list[dict[str, Any]]:
    """A row a strategy."""
    for host in cluster.hosts:
        host.limit(speed.lower())
    command = [sys.executable, "benchmark.py", f"--hostfile={cluster.hostfile(1)}", f"--ssh={cluster.ssh}"]
    command += [f"--strategies={STRATEGIES}", "--speed", f"--steps={STEPS}", f"--write={folder / speed}"]
    settings = calibrate.settings(SHAPE, BATCH, 2, STEPS, "cpu", "float32")
    settings = [word for word in settings if not word.startswith(("--max_iters", "--eval_i", "--log", "--always"))]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # both hosts are this machine, and would take all of its cores each
    subprocess.run([*command, *settings, f"--dataset={folder}/data"], cwd=ROOT, env=one, check=True)
    found = json.loads((folder / speed / "benchmark.json").read_text())["rows"]
    measured = {row["strategy"]: row["step_ms"] / 1e3 for row in found}
    system = machine.system({"gpus": 1, "nodes": 2, "link": rate(speed)}, "")
    return [
        {"model": speed, "strategy": strategy.name, "ranks": 2}
        | {"predicted": {"step": timing(Case(SHAPE, strategy, system), BATCH, False, 1).step()}}
        | {"measured": {"step": measured[strategy.name]}}
        for strategy in named(STRATEGIES)
    ]


def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the rounds of one strategy and link."""
    seconds = {side: [row[side]["step"] for row in rows] for side in ("predicted", "measured")}
    medians = {side: {"step": median(found)} for side, found in seconds.items()}
    return {**rows[0], **medians, "rounds": seconds}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
