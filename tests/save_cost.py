"""The time that a save takes from training, at once and in the background, by strategy: GPT-2 124M, 2 ranks.

    python -m tests.save_cost results/save_cost

What a save takes is how long no step is made, and how much longer the steps are while a thread writes: their time
above the median step of the same run. Runs take turns. Two saves of each are counted; the last, at the end of a run, is
not. It wants some 10 GB of disk.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from data.prepare import Writer
from data.tokenizer import tokenizer_from
from tests.running import rows, run
from training.distributed import SINGLE_PROCESS
from training.run_folder import environment
from training.strategies import find_strategy

STRATEGIES = "single,ddp,fsdp,zero1,zero2,zero3,zero3_offload"
EVERY, SAVES = 6, 2
WAYS = ("at_once", "later")
SETTINGS: dict[str, Any] = {
    **{"device": "cpu", "compile": False, "dtype": "bfloat16", "block_size": 256, "batch_size": 1},
    **{"gradient_accumulation_steps": 2, "warmup_iters": 2, "log_interval": 1, "eval_interval": EVERY, "eval_iters": 1},
    **{"max_iters": EVERY * (SAVES + 1), "keep_checkpoints": 1},
}


def one(strategy: str, later: bool, scratch: Path, extra: list[str]) -> dict[str, Any]:
    """Seconds of a run's saves and of its steps, and the bytes of a checkpoint."""
    ranks, out = 0 if strategy == "single" else 2, scratch / "out"
    chosen = find_strategy(strategy)
    settings = {**SETTINGS, "dataset": scratch / "data", "out_dir": out, "async_save": later}
    given = ["config/train_gpt2.py", *chosen.arguments, *(f"--{k}={v}" for k, v in settings.items()), *extra]
    done = run(chosen.script, *given, ranks=ranks, env={"OMP_NUM_THREADS": "2" if not ranks else "1"})
    if done.returncode:
        sys.exit(f"{strategy}: {done.stderr}")
    saves = [row["save_ms"] / 1e3 for row in rows(out, "save")][:SAVES]
    steps = [row["step_ms"] / 1e3 for row in rows(out, "train") if row["step_ms"]]
    size = sum(path.stat().st_size for path in (out / "checkpoints").rglob("*") if path.is_file())
    shutil.rmtree(out)
    return {"saves": saves, "steps": steps, "bytes": size}


def row(strategy: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds; what the steps of a run are longer for its background saves, shared out over these."""
    about: dict[str, Any] = {"strategy": strategy, "ranks": 1 if strategy == "single" else 2}
    about |= {"bytes": found["later"][0]["bytes"]}
    about["step_s"] = median(second for run in found["at_once"] for second in run["steps"])
    for way in WAYS:
        about[f"{way}_s"] = median(second for run in found[way] for second in run["saves"])
    longer = [sum(run["steps"]) - median(run["steps"]) * len(run["steps"]) for run in found["later"]]
    return about | {"longer_steps_s": median(longer) / SAVES, "runs": found}


def markdown(found: list[dict[str, Any]]) -> str:
    head = [
        "strategy",
        "ranks",
        "checkpoint, MB",
        "step, s",
        "save at once, s",
        "in the background, s",
        "longer steps, s",
    ]
    lines = [head, ["---"] * len(head)]
    for about in found:
        numbers = [about[key] for key in ("step_s", "at_once_s", "later_s", "longer_steps_s")]
        cells = [about["strategy"], str(about["ranks"]), f"{about['bytes'] / 1e6:,.0f}"]
        lines.append([*cells, *(f"{number:.2f}" for number in numbers)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("write", type=Path, help="folder for save_cost.json and save_cost.md")
    parser.add_argument("--strategies", default=STRATEGIES, type=lambda text: text.split(","))
    parser.add_argument("--rounds", default=2, type=int)
    args, extra = parser.parse_known_args()  # the rest goes to the train scripts: a smaller model, say
    found: dict[str, dict[str, list[dict[str, Any]]]] = {s: {way: [] for way in WAYS} for s in args.strategies}
    turns = [(s, way) for _ in range(args.rounds) for s in args.strategies for way in WAYS]
    with tempfile.TemporaryDirectory(dir=args.write.parent.resolve()) as scratch:
        with Writer(Path(scratch) / "data", tokenizer_from({"name": "gpt2"}), "noise") as writer:
            for split in ("train", "val"):
                writer.write(split, np.random.default_rng(0).integers(50257, size=2**16))
        for strategy, way in tqdm(turns, unit="run"):
            found[strategy][way].append(one(strategy, way == "later", Path(scratch), extra))
    table = [row(strategy, runs) for strategy, runs in found.items()]
    args.write.mkdir(parents=True, exist_ok=True)
    about = {"settings": SETTINGS, "extra": extra, "rounds": args.rounds, "environment": environment(SINGLE_PROCESS)}
    (args.write / "save_cost.json").write_text(json.dumps({**about, "rows": table}, indent=1) + "\n")
    (args.write / "save_cost.md").write_text(markdown(table))
    print(markdown(table))


if __name__ == "__main__":
    main()
