"""Real launches of the scripts, and what they leave behind."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# The learning rate is one that trains stably: at 1e-2 the loss spikes, and a spike multiplies a difference of one bit
# in the order of two additions a thousandfold.
TINY = {
    **{"device": "cpu", "compile": False, "dataset": "", "block_size": 32, "batch_size": 4, "eval_iters": 2},
    **{"n_layer": 2, "n_head": 2, "n_embd": 32, "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 5},
    **{"gradient_accumulation_steps": 1, "max_iters": 30, "lr_decay_iters": 30, "eval_interval": 1000},
}


def command(script: str, *arguments: str, ranks: int = 0, **settings) -> list[str]:
    """ranks: 0 without a launcher."""
    launcher = ["launch.py", str(ranks)] if ranks else []
    return [sys.executable, *launcher, script, *arguments, *(f"--{k}={v}" for k, v in settings.items())]


def run(script: str, *arguments: str, ranks: int = 0, env: dict[str, str] | None = None, **settings):
    """The finished process, with its output as text."""
    return subprocess.run(
        command(script, *arguments, ranks=ranks, **settings),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,  # of which DeepSpeed's ops may take a few minutes, where they are not compiled yet
    )


def train(out_dir: Path, dataset: Path, *arguments: str, ranks: int = 0, env: dict[str, str] | None = None, **settings):
    """A run of a tiny model that must end well; its output."""
    script = "train_deepspeed.py" if "deepspeed_config" in settings else "train.py"
    done = run(script, *arguments, ranks=ranks, env=env, **{**TINY, "dataset": dataset, "out_dir": out_dir, **settings})
    assert done.returncode == 0, done.stderr
    return done.stdout


def message(done: subprocess.CompletedProcess) -> str:
    """The one message of a script that ended for its user's error."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ").strip()


def refused(out_dir: Path, dataset: Path, ranks: int = 0, env: dict[str, str] | None = None, **settings) -> str:
    """The one message that a run of a tiny model ends with."""
    script = "train_deepspeed.py" if "deepspeed_config" in settings else "train.py"
    return message(run(script, ranks=ranks, env=env, **{**TINY, "dataset": dataset, "out_dir": out_dir, **settings}))


def zero_json(strategy: str) -> str:
    return f"deepspeed_configs/{strategy}_config.json"


def strategy_settings(strategy: str, scratch: Path) -> dict[str, Any]:
    """Of a strategy on CPU ranks. scratch takes the JSON of ZeRO-3: several sub-groups, as a large model has."""
    if not strategy.startswith("zero"):
        return {"strategy": strategy if strategy == "fsdp" else "auto"}
    if not strategy.startswith("zero3"):
        return {"deepspeed_config": zero_json(strategy)}
    config = json.loads((ROOT / zero_json(strategy)).read_text())
    config["zero_optimization"]["sub_group_size"] = 8000
    path = scratch / f"{strategy}.json"
    path.write_text(json.dumps(config))
    return {"deepspeed_config": path, **({"nvme_path": scratch} if "nvme" in strategy else {})}


def prepare(name: str, *arguments) -> str:
    """What data/NAME/prepare.py says: its output, or its one message where the user is to mend something."""
    done = subprocess.run(
        [sys.executable, f"data/{name}/prepare.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr
    return done.stdout


def started_with(mark: str) -> list[str]:
    """Processes, of any depth, whose environment has it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += [process.name] if mark.encode() in (process / "environ").read_bytes() else []
    return found


def rows(out_dir: Path, kind: str) -> list[dict]:
    text = (out_dir / "metrics.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()  # the run may be writing its next line
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(out_dir: Path, what: str = "loss") -> dict[int, float]:
    found = rows(out_dir, "train")
    steps = [row["step"] for row in found]
    assert len(steps) == len(set(steps)), f"a step is logged twice: {steps}"
    return {row["step"]: row[what] for row in found}


def difference(one: Path, other: Path, what: str = "loss") -> float:
    """The largest difference of loss (or "grad_norm") at any step of two runs."""
    a, b = losses(one, what), losses(other, what)
    assert a.keys() == b.keys(), f"other steps: {sorted(a.keys() ^ b.keys())}"
    return max(abs(a[step] - b[step]) for step in a)


def wait_for_step(out_dir: Path, process: subprocess.Popen, step: int) -> None:
    """Until a run has logged it; AssertionError with what the run said where it ends before."""
    while not (out_dir / "metrics.jsonl").exists() or max(losses(out_dir), default=-1) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
