"""Predicted beside measured over links of several speeds, between two hosts that are network namespaces of one machine.

python -m tests.cluster.plan_links results/plan_check
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

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
SHAPE, BATCH = Shape("4 layers of 256", 4, 4, 256, vocab_size=257, block_size=128, bias=False), 4
STRATEGIES = "ddp,zero2,zero3"


def main(target: Path) -> None:
    machine, rows = calibrate.measure(2, SHAPE, BATCH, "float32"), []
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), 2) as cluster:
        calibrate.noise(Path(folder) / "data")
        for speed in RATES:
            for host in cluster.hosts:
                host.limit(speed.lower())
            written = Path(folder) / speed
            command = [sys.executable, "benchmark.py", f"--hostfile={cluster.hostfile(1)}", f"--ssh={cluster.ssh}"]
            command += [f"--strategies={STRATEGIES}", "--speed", "--rounds=2", "--steps=12", f"--write={written}"]
            settings = calibrate.settings(SHAPE, BATCH, 2, 12, "cpu", "float32")
            settings = [
                word for word in settings if not word.startswith(("--max_iters", "--eval_i", "--log", "--always"))
            ]
            subprocess.run([*command, *settings, f"--dataset={folder}/data"], cwd=ROOT, check=True)
            found = {row["strategy"]: row for row in json.loads((written / "benchmark.json").read_text())["rows"]}
            system = machine.system({"gpus": 1, "nodes": 2, "link": rate(speed)}, "")
            for strategy in named(STRATEGIES):
                predicted = timing(Case(SHAPE, strategy, system), BATCH, False, 1).step()
                row = {"model": speed, "strategy": strategy.name, "ranks": 2, "predicted": {"step": predicted}}
                rows.append(row | {"measured": {"step": found[strategy.name]["step_ms"] / 1e3}})
                print(line(rows[-1]), flush=True)
    write(target, "links", rows, [vars(machine)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
