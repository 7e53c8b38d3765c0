"""Run the scripts as users do, and read the run folders that they write."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests import needs
from tests.fork_server import ForkServer

ROOT = Path(__file__).parent.parent
# Training is stable at this learning rate. At 1e-2 the loss spikes, and a spike multiplies the rounding difference of
# another order of additions a thousandfold.
TINY = {
    **{"device": "cpu", "compile": False, "dataset": "", "block_size": 32, "batch_size": 4, "eval_iters": 2},
    **{"n_layer": 2, "n_head": 2, "n_embd": 32, "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 5},
    **{"gradient_accumulation_steps": 1, "max_iters": 30, "lr_decay_iters": 30, "eval_interval": 1000},
}


# Imports of a run, made once by the server that ranks are forked from.
TORCH = ["torch", "torch.distributed.fsdp", "torch.nn.parallel", "torch._dynamo", "torch.profiler", "safetensors.torch"]
TORCH += ["torch.utils.serialization", "matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.PngImagePlugin"]
DEEPSPEED = [*TORCH, "deepspeed", "deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.zero.muon.muon_optimizer"]
DEEPSPEED += ["deepspeed.module_inject.auto_ep_layer", "torch.utils.cpp_extension"]
IMPORTS = {"train_deepspeed.py": DEEPSPEED, "tests/hf_trainer.py": [*DEEPSPEED, "transformers", "accelerate"]}
IMPORTS.update(dict.fromkeys(["deepspeed.launcher.runner", "tools.accept", "tests.compile_ops"], DEEPSPEED))
IMPORTS.update(dict.fromkeys(["tools.benchmark", "tests.layout_state"], DEEPSPEED))
SERVERS: dict[int, ForkServer] = {}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # before any test changes it


def start_process(command: list[str], fresh: bool = False, **options: Any) -> subprocess.Popen:
    """`subprocess.Popen` in the repository's folder; forked from a process that has imported torch, unless `fresh`."""
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, **options}
    if fresh or sys.platform != "linux":
        return subprocess.Popen(command, **options)
    imports = next((IMPORTS[word] for word in command if word in IMPORTS), TORCH)
    if len(imports) not in SERVERS:
        SERVERS[len(imports)] = ForkServer(imports, ENVIRONMENT)
    return SERVERS[len(imports)].popen(command, **options)


def command(script: str, *arguments: str, ranks: int = 0, **settings) -> list[str]:
    """The command line that runs a script; ranks=0 runs it without a launcher."""
    launcher = ["-m", "launch.ranks", str(ranks)] if ranks else []
    return [sys.executable, *launcher, script, *arguments, *(f"--{k}={v}" for k, v in settings.items())]


def run(
    script: str, *arguments: str, ranks: int = 0, env: dict[str, str] | None = None, fresh: bool = False, **settings
) -> subprocess.CompletedProcess:
    """Run a script to its end, and return the process with its output as text.

    env: variables to add or replace. fresh: execute Python anew instead of forking (see tests/fork_server.py).
    """
    line = command(script, *arguments, ranks=ranks, **settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start_process(line, fresh, env=environment, text=True, **pipes) as process:
        try:  # compiling DeepSpeed's ops takes a few minutes if they are not cached
            output, errors = process.communicate(timeout=600)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(line, process.returncode, output, errors)


def train(out_dir: Path, dataset: Path, *arguments: str, ranks: int = 0, env: dict[str, str] | None = None, **settings):
    """Train a tiny model; returns the output. The run must end with status 0."""
    script = "train_deepspeed.py" if "deepspeed_config" in settings else "train.py"
    if "nvme" in Path(ROOT, settings.get("deepspeed_config", os.devnull)).read_text():
        needs.require("libaio")
    done = run(script, *arguments, ranks=ranks, env=env, **{**TINY, "dataset": dataset, "out_dir": out_dir, **settings})
    assert done.returncode == 0, done.stderr
    return done.stdout


def message(done: subprocess.CompletedProcess) -> str:
    """The error message of a script that ended because of a user error: status 2, one message, no traceback."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ").strip()


def refused(out_dir: Path, dataset: Path, ranks: int = 0, env: dict[str, str] | None = None, **settings) -> str:
    """Train a tiny model with settings that must be refused; returns the error message."""
    script = "train_deepspeed.py" if "deepspeed_config" in settings else "train.py"
    return message(run(script, ranks=ranks, env=env, **{**TINY, "dataset": dataset, "out_dir": out_dir, **settings}))


def zero_json(strategy: str) -> str:
    return f"deepspeed_configs/{strategy}_config.json"


def strategy_settings(strategy: str, scratch: Path) -> dict[str, Any]:
    """Settings of a strategy on CPU ranks; ZeRO-3's JSON is copied to scratch, with the sub-groups of a large model."""
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
    """Run data/NAME/prepare.py; returns its output, or its error message if it ended because of a user error."""
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
    """Ids of all processes whose environment contains `mark`, such as "NAME=value"."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                pids.append(process.name)
    return pids


def rows(out_dir: Path, kind: str) -> list[dict]:
    text = (out_dir / "metrics.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()  # the run may be writing its next line
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(out_dir: Path, key: str = "loss") -> dict[int, float]:
    """The loss, or another number that is logged, by step."""
    logged = rows(out_dir, "train")
    steps = [row["step"] for row in logged]
    assert len(steps) == len(set(steps)), f"a step is logged twice: {steps}"
    return {row["step"]: row[key] for row in logged}


def difference(one: Path, other: Path, key: str = "loss") -> float:
    """The largest difference between the losses (or another logged number) of two runs at any step."""
    a, b = losses(one, key), losses(other, key)
    assert a.keys() == b.keys(), f"steps that only one run has: {sorted(a.keys() ^ b.keys())}"
    return max(abs(a[step] - b[step]) for step in a)


def last_step(out_dir: Path) -> int:
    """The last step that a run, which may still write, has logged; -1 if none."""
    path = out_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return next((json.loads(line)["step"] for line in reversed(lines) if b'"train"' in line), -1)


def wait_for_step(out_dir: Path, process: subprocess.Popen, step: int) -> None:
    """Return when a run has logged the step; AssertionError with its output if it ends before."""
    while last_step(out_dir) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
