"""Compare training strategies on the same model, data and global batch: loss, speed, memory, parts of a step.

    python -m tools.benchmark --compare --strategies=single,ddp,zero2 --ranks=2 config/train_debug.py
    python -m tools.benchmark --strategies=ddp,zero1,zero2,zero3 --gpus=8 --rounds=3 --write=results/mine config/x.py

All other arguments go to the train scripts; docs/benchmark.md says what is measured. A strategy that fails becomes a
row with the reason; Ctrl-C keeps the results so far. Exit status: 0 if all strategies worked and trained the same, 1 if
one did not, 2 for a wrong option.
"""

import argparse
import json
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, SubprocessError
from time import perf_counter

import torch

from data.dataset import open_dataset
from launch import hosts
from tools import benchmark_report as report
from tools.benchmark_report import Case
from tools.plan import RecipeConfig
from tools.terminal import align, make_parser, underscored
from training.config import ROOT, PlainTrainConfig, TrainConfig, parse
from training.distributed import run
from training.errors import UserError
from training.figures import read_rows
from training.run_folder import OUT_OF_MEMORY
from training.speed import summarize
from training.strategies import find_strategy, strategies

# Settings of --compare: correct strategies then differ by rounding only. The learning rate is small, because unstable
# training multiplies rounding differences: at 1e-3, a model of 12 layers reaches 0.08. Without clipping, train.py
# computes no gradient norm, and AdamW hides gradients that are all too large from the loss.
COMPARE = (
    *("--dtype=float32", "--tf32=False", "--compile=False", "--dropout=0.0", "--grad_clip=1.0"),
    *("--learning_rate=1e-4", "--min_lr=1e-5", "--warmup_iters=10"),
)
STEP = re.compile(r"step +\d+/|iter \d+:")  # how a step is printed, by our scripts and nanoGPT's


def strategy_case(row: str, ranks: int, launcher: list[str], arguments: list[str], module: str = "") -> Case:
    """row: a strategy with settings (zero1:tensor_parallel=2); launcher: for several ranks; module: of --beside."""
    name, *settings = row.split(":")
    strategy, ranks = find_strategy(name), 1 if name == "single" else ranks
    own = [argument.format(half=max(1, ranks // 2)) for argument in strategy.arguments]
    own += ["--sequence_parallel=1"] if name == "single" else []
    own += [f"--{setting}" for setting in settings]
    if strategy.script == "train.py":  # leave out DeepSpeed's keys
        plain = PlainTrainConfig.__dataclass_fields__
        arguments = [a for a in arguments if not a.startswith("--") or a[2:].partition("=")[0] in plain]
    launcher = ["-m", "launch.ranks", "1"] if ranks == 1 else launcher
    script = ["-m", module, name] if module else [strategy.script]
    title, start = f"{module} {row}".strip(), [sys.executable, *launcher]
    return Case(title, ranks, start, [*script, *arguments, *own], ours=not module)


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
            launch(case, cfg, folder / str(number))
        except SubprocessError as failure:
            case.status, case.error = failure.args
            print(f"  {case.status}: {case.error}", flush=True)
        except KeyboardInterrupt:
            for _, _, unfinished in turns[number - 1 :]:
                if not unfinished.error:
                    unfinished.status, unfinished.error = "stopped", "interrupted before all of its launches were done"


def time_run(case: Case, cfg: TrainConfig, folder: Path) -> None:
    """Add a round: its training rows, their summary, and the seconds from the launch to the end of the first step."""
    start_s = run_process([*case.launcher, *case.script, "--benchmark", f"--steps={cfg.steps}", f"--out_dir={folder}"])
    rows = [row for _, row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    case.rounds.append({**summarize(rows), "start_s": start_s, "rows": rows})
    if case.ours:
        case.environment = json.loads((folder / "environment.json").read_text())
        del case.environment["command"]  # it names a temporary folder; benchmark.json has the arguments


def probe(case: Case, cfg: TrainConfig, folder: Path) -> None:
    run_process([*case.launcher, "-m", "tools.benchmark_probe", *case.script, f"--out_dir={folder}"])
    case.notes = [json.loads((folder / f"probe_{rank}.json").read_text()) for rank in range(case.ranks)]
    sizes = [path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file()]
    [*_, save] = (row for _, row in read_rows(folder / "metrics.jsonl") if row["kind"] == "save")
    case.checkpoint = {"checkpoint_s": save["save_ms"] / 1e3, "checkpoint_bytes": sum(sizes)}
    shutil.rmtree(folder)  # make room for the next one


def run_process(line: list[str]) -> float:
    """Seconds until the first step is printed. Raises SubprocessError(status, error) of a Case."""
    output, since, seconds = [], perf_counter(), 0.0
    process = Popen(line, stdout=PIPE, stderr=STDOUT, text=True)
    try:
        for text in process.stdout or ():
            output.append(text.rstrip())
            if not seconds and STEP.match(text):
                seconds = perf_counter() - since
        process.wait()
    finally:  # after Ctrl-C, the launcher ends its ranks
        process.terminate()
        process.wait()
    if process.returncode:
        raise explain(output, process.returncode)
    return seconds


def explain(output: list[str], status: int) -> SubprocessError:
    """Why a launch failed, in one line: its error message, else an exception, else the launcher's or the last line."""
    text = re.sub(r"^\[rank\d+\]: *", "", "\n".join(output).strip(), flags=re.M)
    kinds = (r"error: \d+ problems.*\n *(.*)", r"error: (.*)", r"([\w.]+(?:Error|Exception|Interrupt): .*)")
    matches = (re.search("^" + kind, text, re.M) for kind in (*kinds, r"(launch[\w.]*: .*)", r"(.+)\Z"))
    error = next((match[1] for match in matches if match), f"exit status {status} without output")
    full = any(words in error for words in (*OUT_OF_MEMORY, "SIGKILL"))
    return SubprocessError("out of memory" if full else "failed", error)


def read_options() -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the arguments for the train scripts."""
    parser = make_parser("benchmark", __doc__)
    names = f"comma-separated, also with settings (zero1:tensor_parallel=2): {', '.join(strategies())}"
    parser.add_argument("--strategies", required=True, help=names)
    parser.add_argument("--ranks", "--gpus", type=int, help="per strategy (single uses 1); default: all GPUs, else 2")
    parser.add_argument("--hostfile", help="run on these hosts, which share this folder, instead of --ranks")
    parser.add_argument("--ssh", default="ssh", help="ssh command with its options, for --hostfile")
    parser.add_argument("--steps", type=int, default=30, help="steps per run; the first three are not timed")
    parser.add_argument("--rounds", type=int, default=1, help="timed runs per strategy; the strategies take turns")
    parser.add_argument("--compare", action="store_true", help="only losses, with settings that make them comparable")
    parser.add_argument("--speed", action="store_true", help="leave out the probe")
    parser.add_argument("--beside", default="", help="a module that trains by other code, timed as well")
    parser.add_argument("--write", type=Path, help="folder for benchmark.json, benchmark.md and its figures")
    args, arguments = parser.parse_known_args(underscored(sys.argv[1:]))
    if args.compare:
        keys = [word.partition("=")[0] for word in COMPARE]
        settings = [*arguments, *(f"--{setting}" for setting in re.findall("(?<=:)[^:,]+", args.strategies))]
        if clashes := [word for word in settings if word.partition("=")[0] in keys and word not in COMPARE]:
            raise UserError(f"{clashes[0]}: contradicts --compare, which sets {' '.join(COMPARE)}")
        print("compare: a difference beyond rounding is a fault with", *COMPARE)
        arguments += COMPARE
    return args, arguments


def main() -> None:
    args, arguments = read_options()
    cfg = parse(RecipeConfig, [*arguments, "--benchmark", f"--steps={args.steps}"], __doc__ or "")
    gpus = torch.cuda.device_count() if cfg.device != "cpu" else 0
    if args.hostfile:
        args.ranks = sum(hosts.read_hostfile(args.hostfile).values())
        launcher = ["-m", "launch.hosts", f"--hostfile={args.hostfile}", f"--ssh={args.ssh}"]
    else:
        args.ranks = (gpus or 2) if args.ranks is None else args.ranks
        launcher = ["-m", "launch.ranks", str(args.ranks)]
    if args.ranks < 1 or args.rounds < 1:
        raise UserError(f"--ranks={args.ranks}, --rounds={args.rounds}: both must be 1 or more")
    names, modules = dict.fromkeys(args.strategies.split(",")), dict.fromkeys(("", args.beside))
    cases = [strategy_case(row, args.ranks, launcher, arguments, module) for row in names for module in modules]
    open_dataset(ROOT / "data" / cfg.dataset)  # if it is not prepared, say so once
    out = Path(cfg.out_dir).parent  # the disk where a run's checkpoints would be; hosts share it
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=out if out.is_dir() else Path.cwd()) as temporary:
        run_all(cases, cfg, args.rounds, not (args.speed or args.compare), Path(temporary).resolve())
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if gpus else "float32"
    dtype = next((note["dtype"] for case in cases for note in case.notes), dtype)  # as the ranks chose it
    rows = report.make_rows(cases, dtype)
    table = report.make_table(rows, report.COMPARED if args.compare else report.TITLES)
    print("\n" + align(table, ("strategy", "verdict")), *report.failures(rows), sep="\n\n")
    if args.write:
        environment = next((case.environment for case in cases if case.environment), {})
        results = {"format": 2, "arguments": arguments, "environment": environment, "dtype": dtype}
        results |= {"steps": args.steps, "rounds": args.rounds, "machine": report.machine(cases, dtype), "rows": rows}
        args.write.mkdir(parents=True, exist_ok=True)
        print("\nwritten:", *report.write(results, args.write), sep="\n  ")
    sys.exit(any(row["error"] for row in rows))


if __name__ == "__main__":
    run(main)
