"""Launches of a benchmark: every strategy in turn, round by round, then each once more with the probe inside.

The peer is nanoGPT's train.py, with the same shape, batch, accumulation, dtype and steps. It runs in its checkout and
writes nothing there. Its weights and batches differ from ours, so losses are not compared.
"""

import json
import pickle
import re
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, SubprocessError
from time import perf_counter
from typing import Any

import torch

from data.dataset import open_dataset
from training.config import ROOT, PlainTrainConfig, TrainConfig
from training.errors import UserError
from training.figures import read_rows
from training.metrics import WARM_UP_STEPS, summarize
from training.run_folder import OUT_OF_MEMORY
from training.strategies import find_strategy

# A step as nanoGPT and the bare loop print it, the latter with its peak memory; and as all scripts begin to.
PRINTED_STEP = re.compile(r"iter (\d+): loss ([\d.]+|nan), time ([\d.]+)ms(?:, peak (\d+) bytes)?")
ANY_STEP = re.compile(r"iter \d+: loss|step +\d+/")
PEER_KEYS = """gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias learning_rate
    weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr compile"""  # the same in both


@dataclass
class Case:
    """A strategy, or the peer, and what its launches measured."""

    name: str
    ranks: int
    launcher: list[str]  # what starts a script on the ranks
    script: list[str]  # with its arguments
    peer_folder: Path | None = None  # the checkout of nanoGPT, where it is started
    ours: bool = True  # not the peer, nor a loop with nothing around it
    rounds: list[dict[str, Any]] = field(default_factory=list)  # rows of metrics.jsonl with their summary, by launch
    notes: list[dict[str, Any]] = field(default_factory=list)  # the probe's, by rank
    checkpoint: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"  # or "out of memory", "failed", "stopped"
    error: str | None = None


def strategy_case(name: str, ranks: int, launcher: list[str], arguments: list[str], bare: bool = False) -> Case:
    """launcher: for several ranks; arguments: for the train scripts. bare: by tools.benchmark_bare instead of them."""
    strategy, ranks = find_strategy(name), 1 if name == "single" else ranks
    if bare and not re.fullmatch("single|ddp|fsdp|zero[0-3]", name):
        raise UserError(f"--bare: has no loop for {name}; use single, ddp, fsdp or zero0 to zero3")
    own = [argument.format(half=max(1, ranks // 2)) for argument in strategy.arguments]
    if strategy.script == "train.py":  # leave out DeepSpeed's keys
        plain = PlainTrainConfig.__dataclass_fields__
        arguments = [a for a in arguments if not a.startswith("--") or a[2:].partition("=")[0] in plain]
    launcher = ["-m", "launch.ranks", "1"] if ranks == 1 else launcher
    script = ["-m", "tools.benchmark_bare", name] if bare else [strategy.script]
    case_name = f"bare {name}" if bare else name
    return Case(case_name, ranks, [sys.executable, *launcher], [*script, *arguments, *own], ours=not bare)


def peer_case(checkout: Path, cfg: TrainConfig, ranks: int, folder: Path) -> Case:
    """Create the data folder that nanoGPT reads. Its DDP needs GPUs; without them it runs in one process."""
    dataset = open_dataset(ROOT / "data" / cfg.dataset)
    if not (checkout / "configurator.py").is_file():
        raise UserError(f"--peer={checkout}: is not a checkout of nanoGPT: it has no configurator.py")
    if dataset.dtype.itemsize != 2:
        raise UserError(f"--peer: nanoGPT reads 16-bit token ids; {dataset.path('train')} has {dataset.dtype}")
    folder.mkdir()
    for split in ("train", "val"):
        (folder / f"{split}.bin").symlink_to(dataset.path(split).resolve())
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": cfg.model_config(dataset.vocab_size).vocab_size}))
    on_gpu = cfg.device != "cpu" and torch.cuda.is_available()
    settings = {key: getattr(cfg, key) for key in PEER_KEYS.split()}
    settings |= {"dataset": folder, "out_dir": folder}
    settings |= {"max_iters": cfg.steps - 1, "log_interval": 1, "eval_interval": 10**9, "eval_iters": 1}
    settings |= {"device": "cuda" if on_gpu else "cpu"}
    settings |= {"dtype": cfg.dtype} if cfg.dtype != "auto" else {}  # on GPUs its default is ours
    ranks = ranks if on_gpu else 1
    launcher = ["env", "PYTHONDONTWRITEBYTECODE=1", sys.executable, "-u"]  # no caches in the checkout
    launcher += [str(ROOT / "launch" / "ranks.py"), str(ranks)] if ranks > 1 else []
    script = ["train.py", *(f"--{key}={value}" for key, value in settings.items())]
    return Case("nanogpt", ranks, launcher, script, checkout, ours=False)


def run_all(cases: list[Case], cfg: TrainConfig, rounds: int, with_probe: bool, folder: Path) -> None:
    """Run all launches. A case that fails is skipped from then on; Ctrl-C ends the launches and keeps the results."""
    there_and_back = [cases[:: 1 if number % 2 else -1] for number in range(1, rounds + 1)]  # evens out a slow drift
    turns = [(f"round {n} of {rounds}", time_run, case) for n, order in enumerate(there_and_back, 1) for case in order]
    turns += [("memory and parts of a step", probe, case) for case in cases if case.ours and with_probe]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for number, (title, launch, case) in enumerate(turns, 1):
        if case.error:
            continue
        print(f"[{number}/{len(turns)}] {title}: {case.name}", flush=True)
        try:
            launch(case, cfg, folder / f"{case.name}-{number}")
        except SubprocessError as failure:
            case.status, case.error = failure.args
            print(f"  {case.status}: {case.error}", flush=True)
        except KeyboardInterrupt:
            for _, _, unfinished in turns[number - 1 :]:
                if not unfinished.error:
                    unfinished.status, unfinished.error = "stopped", "interrupted before all of its launches were done"


def time_run(case: Case, cfg: TrainConfig, folder: Path) -> None:
    """Add a round: its training rows, their summary, and the seconds from the launch to the end of the first step."""
    options = [] if case.peer_folder else ["--benchmark", f"--steps={cfg.steps}", f"--out_dir={folder}"]
    output, start_s = run_process([*case.launcher, *case.script, *options], case.peer_folder)
    if case.ours:
        rows = [row for _, row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
        case.environment = json.loads((folder / "environment.json").read_text())
        del case.environment["command"]  # it names a temporary folder; benchmark.json has the arguments
    else:
        rows = parse_rows(output, cfg)
    case.rounds.append({**summarize(rows), "start_s": start_s, "rows": rows})


def probe(case: Case, cfg: TrainConfig, folder: Path) -> None:
    run_process([*case.launcher, "-m", "tools.benchmark_probe", *case.script, f"--out_dir={folder}"])
    case.notes = [json.loads((folder / f"probe_{rank}.json").read_text()) for rank in range(case.ranks)]
    sizes = [path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file()]
    [*_, save] = (row for _, row in read_rows(folder / "metrics.jsonl") if row["kind"] == "save")
    case.checkpoint = {"checkpoint_s": save["save_ms"] / 1e3, "checkpoint_bytes": sum(sizes)}
    shutil.rmtree(folder)  # make room for the next one


def parse_rows(output: list[str], cfg: TrainConfig) -> list[dict[str, Any]]:
    """Printed steps as rows of metrics.jsonl. As in our runs, the warm-up steps have no time."""
    tokens, rows = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size, list[dict[str, Any]]()
    for match in filter(None, map(PRINTED_STEP.match, output)):
        row: dict[str, Any] = {"step": int(match[1]), "loss": float(match[2]), "step_ms": None, "mfu": None}
        if row["step"] >= WARM_UP_STEPS:
            row |= {"step_ms": float(match[3]), "tokens_per_second": 1e3 * tokens / float(match[3])}
        rows.append({**row, "peak_memory_bytes": int(match[4] or 0)})
    if len(rows) < cfg.steps:
        raise SubprocessError("failed", f"{len(rows)} of {cfg.steps} steps in its output")
    return rows


def run_process(line: list[str], cwd: Path | None = None) -> tuple[list[str], float]:
    """Output lines, and seconds until the first step's. Raises SubprocessError(status, error) of a Case."""
    output, since, seconds = [], perf_counter(), 0.0
    process = Popen(line, cwd=cwd, stdout=PIPE, stderr=STDOUT, text=True)
    try:
        for text in process.stdout or ():
            output.append(text.rstrip())
            if not seconds and ANY_STEP.match(text):
                seconds = perf_counter() - since
        process.wait()
    finally:  # after Ctrl-C, the launcher ends its ranks
        process.terminate()
        process.wait()
    if process.returncode:
        raise explain(output, process.returncode)
    return output, seconds


def explain(output: list[str], status: int) -> SubprocessError:
    """Why a launch failed, in one line: its error message, else an exception, else the launcher's or the last line."""
    text = re.sub(r"^\[rank\d+\]: *", "", "\n".join(output).strip(), flags=re.M)
    kinds = (r"error: \d+ problems.*\n *(.*)", r"error: (.*)", r"([\w.]+(?:Error|Exception|Interrupt): .*)")
    matches = (re.search("^" + kind, text, re.M) for kind in (*kinds, r"(launch[\w.]*: .*)", r"(.+)\Z"))
    error = next((match[1] for match in matches if match), f"exit status {status} without output")
    full = any(words in error for words in (*OUT_OF_MEMORY, "SIGKILL"))
    return SubprocessError("out of memory" if full else "failed", error)
