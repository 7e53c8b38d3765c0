"""Check this machine, or every host of a hostfile, before a long run: what is missing, too small or too slow.

    python -m tools.doctor config/train_gpt2.py --out_dir=out-gpt2
    python -m tools.doctor --hostfile=hostfile config/train_gpt2_deepspeed_zero3.py

Takes the recipes and --key=value of both train scripts, and compares memory, disks and data with what the run needs;
without them, only the machine is checked. Exit status: 0 all checks passed, 1 some failed, 2 wrong option.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise

import torch

from launch import hosts, machine
from launch.hosts import Slots
from model import GPTConfig
from tools.doctor_host import Finding, Request, existing
from tools.plan import GPT2_VOCABULARY, MODELS, RecipeConfig
from tools.plan_formulas import Part, by_device
from tools.terminal import make_parser, underscored
from training import deepspeed_config, distributed, parallel
from training.config import ROOT, parse
from training.deepspeed_config import describe_json, nvme_blocks
from training.deepspeed_engine import needed
from training.errors import ConfigError, UserError, count
from training.run_folder import TESTED_TORCH
from training.strategies import ModelState

ANSWER = {"findings": list, "data": int, "device": str, **hosts.ANSWER}
CHECKPOINT_BYTES = 16  # per parameter: weights, their fp32 copy, two moments
SLOW_LINK, MIN_GBIT = 0.5, 0.05  # a link fails below this share of the fastest one, or below this rate
LINK_FIX = "check cable, switch and firewall, or name another network in GLOO_SOCKET_IFNAME (GPUs: NCCL_SOCKET_IFNAME)"


def make_requests(cfg: RecipeConfig, all_hosts: Slots, known: bool, marker: str = "") -> dict[str, Request]:
    """What a run needs of each host. known: whether settings were given. marker: a file here, in out_dir."""
    config = deepspeed_config.read(cfg.deepspeed_config)
    stage, optimizer, weights = describe_json(config)
    strategy = f"zero{stage}"
    if cfg.strategy == "fsdp":
        strategy, config = "fsdp", {}
        optimizer = weights = "cpu" if cfg.cpu_offload else "gpu"
    model = GPTConfig(*MODELS[cfg.init_from]) if cfg.init_from in MODELS else cfg.model_config(GPT2_VOCABULARY)
    parameters, ranks = model.parameter_count() if known else 0, sum(all_hosts.values())
    for name, rule in parallel.problems(cfg, cfg.layout(), ranks, min(all_hosts.values())):
        raise ConfigError(f"{name} = {getattr(cfg, name)}: {rule}")
    part = Part(model, cfg.layout(), ranks, cfg.shard_ranks)
    state = part.state(strategy, torch.float32) if known else ModelState(0, 0, 0)  # bf16 takes less
    request = {
        "device": cfg.device,  # auto, cpu, cuda
        "environment": hosts.forwarded_environment(os.environ),  # of the ranks
        "ops": list(needed(config, "cpu")),  # DeepSpeed's C++ ops
        "state_bytes": by_device(state, optimizer, weights),  # model state of a rank
        "nvme_path": next((cfg.nvme_path or disk.get("nvme_path", "/local_nvme") for disk in nvme_blocks(config)), ""),
        "out_dir": cfg.out_dir,
        "kept_bytes": (cfg.keep_checkpoints + 2) * CHECKPOINT_BYTES * parameters,  # the best and the one written, too
        "dataset": str(ROOT / "data" / cfg.dataset) if known else "",
        "marker": marker,  # a file in out_dir, which all hosts see if they share it
        "torch": TESTED_TORCH,
        **{"nccl_shm_bytes": distributed.NCCL_SHARED_MEMORY, "shm_fix": distributed.LARGER_SHARED_MEMORY},
    }
    return {host: {**request, "slots": slots} for host, slots in all_hosts.items()}


def compare(answers: hosts.Answers) -> Iterator[Finding]:
    """What the hosts found about themselves, and whether they agree with the first one that answered."""
    one = next((name for name, facts in answers.items() if not isinstance(facts, str)), "")
    for name, facts in answers.items():
        if isinstance(facts, str):
            problem, _, fix = facts.partition("; ")
            yield Finding("ssh", problem, False, fix, name)
            continue
        yield from (Finding(**{**f, "host": name}) for f in facts["findings"])
        if len(answers) == 1:
            return
        for what in (*machine.SAME, "data", "device"):
            value, same = facts[what], facts[what] == answers[one][what]
            text = "same" if same else f"{value}, but {answers[one][what]} on {one}"
            yield Finding(f"{what} of all hosts", text, same, "install the same on every host", name)


def check_links(
    reachable: Slots, answers: hosts.Answers, ssh: str, address: str, command: list[str]
) -> Iterator[Finding]:
    """One rank per host: each pair of neighbors, then all hosts together. On a single host, all its ranks."""
    groups = [dict.fromkeys(pair, 1) for pair in pairwise(reachable)]
    if len(reachable) > 2:
        groups.append(dict.fromkeys(reachable, 1))
    elif len(reachable) == 1 and sum(reachable.values()) > 1:
        groups.append(reachable)
    results = [all_reduce(group, answers, ssh, address, command) for group in groups]
    fastest = max((gbit for gbit, _ in results), default=0.0)
    for group, (gbit, value) in zip(groups, results, strict=True):
        name = " - ".join(group) if len(group) < 3 else f"all {len(group)} hosts"
        least = max(MIN_GBIT, SLOW_LINK * fastest) if len(group) < 3 else 0.0
        yield Finding("all-reduce", value, gbit > 0 and gbit >= least, LINK_FIX, name)


def all_reduce(group: Slots, answers: hosts.Answers, ssh: str, address: str, command: list[str]) -> tuple[float, str]:
    """Gbit/s between the hosts of a group and its text, or 0 and why. address: of the first host of the hostfile."""
    first = next(iter(group))  # it has rank 0, which prints
    try:
        plans = hosts.make_plans(group, answers, address if first == next(iter(answers)) else "", command)
    except UserError as error:  # the name is that of the loopback interface
        return 0.0, str(error)
    for plan in plans.values():
        plan["heartbeat_timeout"] = hosts.ANSWER_SECONDS
    measured = hosts.ask(group, ssh, ["-m", "launch.ranks", "--node"], plans, {"gbit_per_second": float})
    result = measured[first]
    if not isinstance(result, str):
        return result["gbit_per_second"], f"{result['gbit_per_second']:,.3f} Gbit/s each way"
    errors = [text.removeprefix("error: ") for text in measured.values() if not text.startswith("ssh ended")]
    return 0.0, next(iter(errors), "the ranks ended without a message").partition("; ")[0]


def report(findings: list[Finding]) -> str:
    """Failures and their fixes first. Hosts that pass the same check share a line, with the value of the first."""
    failed, passed = [f for f in findings if not f.ok], dict[tuple[str, str], list[Finding]]()
    lines = [f"FAIL  {f.check:<20}  {f.host:<18}  {f.value}\n      {f.fix}" for f in failed]
    for f in findings:
        if f.ok:
            passed.setdefault((f.check, f.host if f.check == "all-reduce" else ""), []).append(f)
    for (check, _), group in passed.items():
        names = group[0].host if len(group) == 1 else f"{len(group)} hosts"
        lines.append(f"ok    {check:<20}  {names:<18}  {group[0].value}")
    return "\n".join([*lines, f"{count(len(failed), 'check')} failed" if failed else "all checks passed"])


def main() -> None:
    parser = make_parser("doctor", __doc__)
    hosts.add_arguments(parser)
    parser.add_argument("--ranks", "--gpus", type=int, default=0, help="on this machine; default: all GPUs, else 2")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args, settings = parser.parse_known_args(underscored(sys.argv[1:]))
    if args.ranks < 0:
        raise UserError(f"--ranks={args.ranks}: must be 1 or more, or 0 for the default")
    cfg = parse(RecipeConfig, settings, "")
    gpus = machine.count_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")) if cfg.device in ("auto", "cuda") else 0
    all_hosts, ssh = {"localhost": args.ranks or gpus or 2}, ""
    if args.hostfile:
        all_hosts, ssh = hosts.read_hostfile(args.hostfile), args.ssh
    if not args.json:
        ranks = count(sum(all_hosts.values()), "rank")
        print(f"{ranks}:", *(settings or ["without a recipe, only the machine is checked"]), flush=True)
    with tempfile.NamedTemporaryFile(dir=existing(cfg.out_dir) if ssh else None, prefix=".doctor-") as marker:
        requests = make_requests(cfg, all_hosts, bool(settings), marker.name if ssh else "")
        answers = hosts.ask(all_hosts, ssh, ["-m", "tools.doctor_host"], requests, ANSWER)
    findings = list(compare(answers))
    if reachable := {host: slots for host, slots in all_hosts.items() if not isinstance(answers[host], str)}:
        command = ["-m", "tools.all_reduce", f"--device={cfg.device}", f"--backend={cfg.backend}"]
        findings += check_links(reachable, answers, ssh, args.master_addr, command)
    print(json.dumps([asdict(f) for f in findings], indent=1) if args.json else report(findings))
    sys.exit(not all(finding.ok for finding in findings))


if __name__ == "__main__":
    distributed.run(main)
