"""Look at this machine, or at every host of a hostfile, before a long run: what is missing, too small or too slow.

    python doctor.py
    python doctor.py config/train_gpt2.py --out_dir=out-gpt2
    python doctor.py --hostfile=hostfile config/train_gpt2_xl.py --deepspeed_config=deepspeed_configs/zero3_config.json

Config files and --key=value are those of train_deepspeed.py, whose --help lists them: with them, memory, disks and data
are compared with what that run needs. (For train.py, name deepspeed_configs/zero0_config.json: its ranks hold as much.)
Disks and the network are measured for real, in seconds. The status is 0 where all is well, 1 where something is red, 2
for a wrong option.
"""

import argparse
import os
import sys

from training import deepspeed_config, ending, hostfile, hosts, machine
from training.batches import DATA
from training.config import parse
from training.deepspeed_config import DeepSpeedTrainConfig
from training.doctor import interview, links, needs, report
from training.errors import UserError
from training.hostfile import Host

HERE = "this machine"


def options() -> tuple[argparse.Namespace, list[str]]:
    """Ours, and what belongs to the run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hostfile", default="", help="a line a host: NAME slots=RANKS; default: this machine")
    parser.add_argument("--include", default="", help="only these: host1@host2:0,1 (all slots, or those named)")
    parser.add_argument("--exclude", default="", help="not these; written as --include")
    parser.add_argument("--ssh", default="ssh", help="with its options: 'ssh -p 2222 -i key -l user'")
    parser.add_argument("--master_addr", default="", help="of the first host, as the others reach it")
    parser.add_argument("--master_port", type=int, default=0, help="free there; default: one that is")
    parser.add_argument("--ranks", type=int, default=0, help="of this machine; default: one a GPU, or 2 on the CPU")
    parser.add_argument("--patience", type=float, default=60, help="seconds for the ranks of a link to be done")
    parser.add_argument("--json", action="store_true", help="hosts and findings, for programs")
    return parser.parse_known_args()


def main() -> None:
    args, rest = options()
    cfg = parse(DeepSpeedTrainConfig, deepspeed_config.arguments(rest), __doc__ or "")
    wanted = hostfile.read(args.hostfile, args.include, args.exclude) if args.hostfile else [local(args.ranks, cfg)]
    ranks = sum(len(host.slots) for host in wanted)
    config = deepspeed_config.read(cfg.deepspeed_config)
    need = needs.of(cfg, config, ranks, len(wanted), known=bool(rest))
    ssh, address = (args.ssh, args.master_addr) if args.hostfile else ("", "localhost")
    travels = hosts.environment(os.environ)
    about = {"out_dir": cfg.out_dir, "dataset": str(DATA / cfg.dataset), "nvme": need.nvme, "port": args.master_port}
    say(f"looking at {len(wanted)} hosts" if args.hostfile else "looking at this machine")
    found = interview.examine(wanted, ssh, {**about, "environment": travels})
    findings = list(report.judge(wanted, found, need, ssh))
    here = [host for host in wanted if not isinstance(found[host.name], str)]
    if here:
        command = ["all_reduce.py", f"--device={cfg.device}", f"--backend={cfg.backend}"]
        network = links.Network(found, ssh, address, travels, command, args.patience)
        findings += links.findings(network.measure(here, say), need)
    say("")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(report.as_json(findings, wanted) if args.json else report.table(findings, len(wanted), colour))
    sys.exit(any(finding.ok is False for finding in findings))


def local(ranks: int, cfg: DeepSpeedTrainConfig) -> Host:
    if ranks < 0:
        raise UserError(f"--ranks={ranks}: must be 1 or more")
    gpus = machine.gpus() if cfg.device in ("auto", "cuda") else 0
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = min(gpus, len(list(filter(None, visible.split(",")))))
    return Host(HERE, tuple(range(ranks or gpus or 2)))


def say(text: str) -> None:
    """What takes a while, on a line that goes away."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    ending.run(main)
