"""Strategies side by side on the same model, data and global batch: loss, speed, memory, and where the time goes.

    python benchmark.py --strategies=ddp,zero1,zero2,zero3,zero3_offload --gpus=8 --steps=100 config/train_gpt2.py
    python benchmark.py --strategies=ddp,zero2 --ranks=4 --rounds=3 --speed --write=results/speed config/train_debug.py
    python benchmark.py --strategies=single,ddp --peer=../nanoGPT --write=results/peer config/train_debug.py

Each is a real launch with processes of its own; they take turns, --rounds times, and then each runs once more with a
probe inside, for its memory, the parts of its steps, and a checkpoint. What is no option here goes to the train
scripts. The first strategy that works is what the others are compared with, round by round. One that fails, for want
of memory or otherwise, is a row that says why; Ctrl-C ends the launches and keeps what there is. The status is 0 where
all worked, 1 where one did not (everything is written all the same), 2 for a wrong option.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from training import deepspeed_config, ending, hostfile
from training.benchmark import figures, peer, probe, results, rounds, rows, strategies, table
from training.benchmark.rounds import Case, Plan
from training.config import parse
from training.deepspeed_config import DeepSpeedTrainConfig
from training.errors import UserError
from training.train_config import TrainConfig


def options() -> tuple[argparse.Namespace, list[str]]:
    """Ours, and what belongs to the train scripts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = f"of {', '.join(strategies.known())}"
    parser.add_argument("--strategies", required=True, type=lambda text: text.split(","), help=names)
    count = "of each strategy but single; default: all GPUs, or 2 ranks on the CPU"
    parser.add_argument("--ranks", type=int, help=count)
    parser.add_argument("--gpus", type=int, help="the same, of which each is to have a GPU, unless --device=cpu")
    parser.add_argument("--hostfile", help="instead of --ranks: on these hosts, which share this folder")
    parser.add_argument("--ssh", default="ssh", help="with its options, for --hostfile")
    parser.add_argument("--steps", type=int, default=30, help="of each run; the first three are not timed")
    parser.add_argument("--rounds", type=int, default=1, help="how often the strategies take turns")
    parser.add_argument("--memory", action="store_true", help="with a short probe: of memory only")
    parser.add_argument("--speed", action="store_true", help="without the probe")
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT: its train.py is timed as well")
    parser.add_argument("--write", type=Path, help="folder for benchmark.json, benchmark.md and figures")
    return parser.parse_known_args()


def check(args: argparse.Namespace, cfg: TrainConfig) -> None:
    """Raises UserError for what no launch could do."""
    for name, least in (("ranks", 1), ("steps", 5), ("rounds", 1)):
        if getattr(args, name) < least:
            why = ", as the first three are not timed" * (name == "steps")
            raise UserError(f"--{name}={getattr(args, name)}: must be {least} or more{why}")
    if args.memory and args.speed:
        raise UserError("--memory and --speed: choose one, or none for all that can be measured")
    micro_steps, ranks = cfg.gradient_accumulation_steps, args.ranks
    if micro_steps % ranks and args.strategies != ["single"]:
        fits = " or ".join(str(n * ranks) for n in (micro_steps // ranks, micro_steps // ranks + 1) if n)
        raise UserError(
            f"gradient_accumulation_steps = {micro_steps}: must be divisible by the {ranks} ranks that share it, or no "
            f"strategy can take the same batch; set {fits}"
        )
    wanted = cfg.device.startswith("cuda") or (cfg.device == "auto" and bool(args.gpus or torch.cuda.is_available()))
    if wanted and not args.hostfile and ranks > (there := torch.cuda.device_count()):
        raise UserError(f"--gpus={ranks}: this machine has {there} GPUs; use fewer, or --device=cpu")
    if args.peer:
        peer.check(args.peer, cfg)


def plan(args: argparse.Namespace, cfg: TrainConfig, arguments: list[str]) -> Plan:
    launcher = ["launch.py", str(args.ranks)]
    if args.hostfile:
        launcher = ["launch_hosts.py", f"--hostfile={args.hostfile}", f"--ssh={args.ssh}"]
    on_gpu = cfg.device != "cpu" and torch.cuda.is_available()
    depth = "none" if args.speed else "--memory" if args.memory else ""
    return Plan(cfg, arguments, launcher, args.steps, args.rounds, depth, on_gpu, args.peer)


def dtype_of(plan: Plan, cases: list[Case]) -> str:
    """Of the matmuls, as a rank chose it; without the probe, as a CPU would."""
    noted = [note["dtype"] for case in cases for note in case.notes]
    named = plan.cfg.dtype if plan.cfg.dtype != "auto" else "bfloat16" if plan.on_gpu else "float32"
    return noted[0] if noted else named


def write(folder: Path, found: results.Results) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.md").write_text(table.markdown(found["rows"]))
    written = [results.write(folder, found), folder / "benchmark.md"]
    if any(row.get("tokens_per_second") for row in found["rows"]):
        written += figures.write(found["rows"], folder)
    print("\nwritten:", *written, sep="\n  ")


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:  # of a rank
        return probe.main(sys.argv[2:])
    args, arguments = options()
    cfg = parse(DeepSpeedTrainConfig, deepspeed_config.arguments(arguments), __doc__ or "")
    args.ranks = args.ranks if args.gpus is None else args.gpus
    if args.hostfile:
        args.ranks = sum(len(host.slots) for host in hostfile.read(args.hostfile))
    gpus = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    args.ranks = args.ranks if args.ranks is not None else gpus or 2
    check(args, cfg)
    wanted = strategies.find(args.strategies, args.ranks)
    common = plan(args, cfg, arguments)
    cases = rounds.cases(wanted, common)
    disk = Path(cfg.out_dir).parent  # where a run's checkpoints would go; hosts share it
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=disk if disk.is_dir() else Path.cwd()) as folder:
        rounds.take(cases, common, Path(folder).resolve())
    dtype = dtype_of(common, cases)
    found = rows.of_cases(cases, dtype)
    print("\n" + table.markdown(found), end="")
    if args.write:
        environment = next((case.environment for case in cases if case.environment), {})
        about = {"arguments": arguments, "environment": environment, "dtype": dtype}
        write(args.write, {**about, "steps": args.steps, "rounds": args.rounds, "rows": found})
    sys.exit(any(row["status"] != "ok" for row in found))


if __name__ == "__main__":
    ending.run(main)
