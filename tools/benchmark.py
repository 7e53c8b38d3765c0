"""Compare training strategies on the same model, data and global batch: loss, speed, memory, parts of a step.

    python -m tools.benchmark --compare --strategies=single,ddp,zero2 --ranks=2 config/train_debug.py
    python -m tools.benchmark --strategies=ddp,zero1,zero2,zero3 --gpus=8 --rounds=3 --write=results/mine config/x.py

All other arguments go to the train scripts; docs/benchmark.md says what is measured. A strategy that fails becomes a
row with the reason; Ctrl-C keeps the results so far. Exit status: 0 if all strategies worked and trained the same, 1 if
one did not, 2 for a wrong option.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from data.dataset import open_dataset
from launch import hosts
from tools import benchmark_report as report
from tools.benchmark_launches import peer_case, run_all, strategy_case
from tools.terminal import make_parser, underscored
from training.checkpoint import write_text
from training.config import ROOT, parse
from training.deepspeed_config import DeepSpeedTrainConfig
from training.distributed import run
from training.errors import UserError
from training.strategies import strategies

# Settings of --compare: correct strategies then differ by rounding only. The learning rate is small, because unstable
# training multiplies rounding differences: at 1e-3, a model of 12 layers reaches 0.08. Without clipping, train.py
# computes no gradient norm, and AdamW hides gradients that are all too large from the loss.
COMPARE = (
    *("--dtype=float32", "--tf32=False", "--compile=False", "--dropout=0.0", "--grad_clip=1.0"),
    *("--learning_rate=1e-4", "--min_lr=1e-5", "--warmup_iters=10"),
)


def read_options() -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the arguments for the train scripts."""
    parser = make_parser("benchmark", __doc__)
    parser.add_argument("--strategies", required=True, help=f"comma-separated: {', '.join(strategies())}")
    parser.add_argument("--ranks", "--gpus", type=int, help="per strategy (single uses 1); default: all GPUs, else 2")
    parser.add_argument("--hostfile", help="run on these hosts, which share this folder, instead of --ranks")
    parser.add_argument("--ssh", default="ssh", help="ssh command with its options, for --hostfile")
    parser.add_argument("--steps", type=int, default=30, help="steps per run; the first three are not timed")
    parser.add_argument("--rounds", type=int, default=1, help="timed runs per strategy; the strategies take turns")
    parser.add_argument("--compare", action="store_true", help="only losses, with settings that make them comparable")
    parser.add_argument("--speed", action="store_true", help="leave out the probe")
    parser.add_argument("--bare", action="store_true", help="time a loop with nothing around it beside each strategy")
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT, whose train.py is timed as well")
    parser.add_argument("--write", type=Path, help="folder for benchmark.json, benchmark.md and its figures")
    args, arguments = parser.parse_known_args(underscored(sys.argv[1:]))
    if args.compare:
        names = [word.partition("=")[0] for word in COMPARE]
        if clashes := [word for word in arguments if word.partition("=")[0] in names and word not in COMPARE]:
            raise UserError(f"{clashes[0]}: contradicts --compare, which sets {' '.join(COMPARE)}")
        print("compare: a difference beyond rounding is a fault with", *COMPARE)
        arguments += COMPARE
    return args, arguments


def main() -> None:
    args, arguments = read_options()
    timed = [*arguments, "--benchmark", f"--steps={args.steps}"]
    cfg = parse(DeepSpeedTrainConfig, timed, __doc__ or "")
    gpus = torch.cuda.device_count() if cfg.device != "cpu" else 0
    if args.hostfile:
        args.ranks = sum(len(host.slots) for host in hosts.read_hostfile(args.hostfile))
        launcher = ["-m", "launch.hosts", f"--hostfile={args.hostfile}", f"--ssh={args.ssh}"]
    else:
        args.ranks = (gpus or 2) if args.ranks is None else args.ranks
        launcher = ["-m", "launch.ranks", str(args.ranks)]
    if args.ranks < 1 or args.rounds < 1:
        raise UserError(f"--ranks={args.ranks}, --rounds={args.rounds}: both must be 1 or more")
    names = list(dict.fromkeys(args.strategies.split(",")))
    loops = (False, True) if args.bare else (False,)
    cases = [strategy_case(name, args.ranks, launcher, arguments, bare) for name in names for bare in loops]
    open_dataset(ROOT / "data" / cfg.dataset)  # if it is not prepared, say so once
    out = Path(cfg.out_dir).parent  # the disk where a run's checkpoints would be; hosts share it
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=out if out.is_dir() else Path.cwd()) as temporary:
        folder = Path(temporary).resolve()
        if args.peer:
            cases.append(peer_case(args.peer, cfg, max(case.ranks for case in cases), folder / "peer"))
        run_all(cases, cfg, args.rounds, not (args.speed or args.compare), folder)
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if gpus else "float32"
    dtype = next((note["dtype"] for case in cases for note in case.notes), dtype)  # as the ranks chose it
    rows = report.make_rows(cases, dtype)
    titles = report.COMPARED if args.compare else report.BARE if args.bare else report.TITLES
    print("\n" + report.text_table(rows, titles))
    if args.write:
        environment = next((case.environment for case in cases if case.environment), {})
        results = {"format": 2, "arguments": arguments, "environment": environment}
        results |= {"dtype": dtype, "steps": args.steps, "rounds": args.rounds}
        results |= {"machine": report.machine(cases, dtype), "rows": rows}
        args.write.mkdir(parents=True, exist_ok=True)
        write_text(args.write / "benchmark.json", json.dumps(results, indent=1) + "\n")
        written = report.write_page(results, args.write)
        print("\nwritten:", args.write / "benchmark.json", *written, sep="\n  ")
    sys.exit(any(row["error"] for row in rows))


if __name__ == "__main__":
    run(main)
