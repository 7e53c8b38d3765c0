"""Peak memory and step times of real training runs on CPU ranks, beside the planner's predictions.

    python -m tests.plan_check results/plan_check            # predict again, from what was measured before
    python -m tests.plan_check results/plan_check --measure  # 31 short runs, 20 minutes on 2 cores

All runs have a malloc that returns freed memory to the system at once (MALLOC). Otherwise glibc keeps some, another
amount in each run, which no formula knows. What a process holds besides tensors is measured once, with one process and
a model that is not among those predicted.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare import Writer
from data.tokenizer import ByteTokenizer
from model import GPTConfig
from tests.running import ROOT, run
from tools.plan_formulas import Candidate, Machines
from training.strategies import find_strategy

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # bytes from which on glibc maps memory, and unmaps it when freed
MODELS = {  # with the sequences of a rank and micro-step
    "25M": (GPTConfig(256, 257, 8, 8, 512, bias=False), 2),
    "57M": (GPTConfig(128, 257, 8, 12, 768, bias=False), 1),
}
SAMPLE = GPTConfig(128, 257, 2, 8, 512, bias=False), 1
LINKED, TFLOPS = GPTConfig(128, 257, 4, 4, 256, bias=False), 0.04925  # of results/zero_links
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
MICRO_STEPS = 2
Row = dict[str, Any]


def system(gpus: int, nodes: int, process_bytes: float = 0.0, link: float = 1.0) -> Machines:
    """CPU ranks in fp32. TFLOPS is what makes DDP's step over the fastest link of results/zero_links as it was."""
    rates = {"gpu_memory": 1.0, "tflops": TFLOPS, "memory_bandwidth": 20.0, "node_link": link, "link": link}
    shares = {"achievable": 1.0, "link_share": 1.0, "overlap": 0.5, "fragmentation": 0.0}
    return Machines(gpus, nodes, "cpu", dtype="float32", baseline=process_bytes / 1e9, **rates, **shares)


def predict(model: GPTConfig, batch: int, strategy: str, ranks: int, process_bytes: float) -> float:
    """Bytes of a rank at peak."""
    machine = system(ranks, 1, process_bytes)
    return Candidate(model, find_strategy(strategy), machine, batch, MICRO_STEPS, checkpointing=False).memory


def step_times() -> list[Row]:
    """Seconds of a step, predicted and measured, over the links of results/zero_links between two ranks."""
    found = []
    for name, gbit in (("10gbit", 10.0), ("1gbit", 1.0), ("100mbit", 0.1)):
        for row in json.loads((ROOT / f"results/zero_links/{name}/benchmark.json").read_text())["rows"]:
            machine = system(1, 2, link=gbit)
            case = Candidate(LINKED, find_strategy(row["strategy"]), machine, 4, 1, checkpointing=False)
            about = {"link": f"{gbit:g} Gbit/s", "strategy": row["strategy"]}
            found.append({**about, "predicted": case.seconds, "measured": row["step_ms"] / 1e3})
    return found


def measure(model: GPTConfig, batch: int, name: str, ranks: int, data: Path) -> float:
    """Bytes of the rank with most, at peak, in a run of a few steps that begins with an evaluation."""
    strategy, shape = find_strategy(name), ("n_layer", "n_head", "n_embd", "block_size", "bias")
    settings: Row = {key: getattr(model, key) for key in shape} | {"batch_size": batch, "dataset": data}
    settings |= {"gradient_accumulation_steps": MICRO_STEPS * ranks, "max_iters": 3, "log_interval": 1}
    settings |= {"eval_iters": 1, "always_save_checkpoint": False, "compile": False, "device": "cpu"}
    with tempfile.TemporaryDirectory() as out_dir:
        done = run(
            strategy.script, *strategy.arguments, ranks=ranks, env=MALLOC, fresh=True, out_dir=out_dir, **settings
        )
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]
    return max(row["peak_memory_bytes"] for row in rows if row["kind"] == "train")


def measure_all() -> Row:
    """process_bytes, and a row per model, strategy and number of ranks; DDP on one rank is a single process."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        with Writer(data, ByteTokenizer(), "noise") as writer:
            for split in ("train", "val"):
                writer.write(split, np.arange(2**16) % 256)
        found: Row = {"environment": MALLOC, "rows": []}
        found["process_bytes"] = measure(*SAMPLE, "single", 1, data) - predict(*SAMPLE, "single", 1, 0.0)
        for model in MODELS:
            for ranks in (1, 2, 4):
                for name in ("single" if ranks == 1 else "ddp", *STRATEGIES[1:]):
                    peak = measure(*MODELS[model], name, ranks, data)
                    found["rows"].append({"model": model, "strategy": name, "ranks": ranks, "measured": peak})
    return found


def main(folder: Path, again: bool) -> None:
    path = folder / "check.json"
    found = measure_all() if again else json.loads(path.read_text())
    lines = ["| model | strategy | ranks | peak memory, MB, predicted | measured | ratio |", f"{'|---' * 6}|"]
    for row in found["rows"]:
        row["predicted"] = predict(*MODELS[row["model"]], row["strategy"], row["ranks"], found["process_bytes"])
        cells = [row["model"], row["strategy"], row["ranks"]]
        cells += [f"{row[side] / 1e6:,.0f}" for side in ("predicted", "measured")]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['predicted'] / row['measured']:.2f} |")
    path.write_text(json.dumps(found, indent=1) + "\n")
    (folder / "check.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), again="--measure" in sys.argv)
