"""What the doctor says: every rule applied to every host, as a table or as JSON."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from training.doctor import storage, system
from training.doctor.case import Case, Finding, Rule
from training.doctor.needs import Need
from training.hostfile import Host

RULES: dict[str, Rule] = {
    "code": system.code,
    "Python": system.python,
    "torch": system.torch,
    "DeepSpeed": system.deepspeed,
    "other packages": system.packages,
    "GPUs": system.gpus,
    "nvcc": system.nvcc,
    "C++ compiler": system.tool("compiler", "apt-get install g++"),
    "Python headers": system.tool("headers", "apt-get install python3-dev"),
    "ninja": system.tool("ninja", "pip install ninja"),
    "libaio": system.tool("libaio", "apt-get install libaio-dev", op="async_io"),
    "cores": system.cores,
    "memory": system.memory,
    "GPU memory": system.gpu_memory,
    "shared memory": system.shared_memory,
    "open files": system.at_least("open files", lambda case: system.FILES, "ulimit -n 65536"),
    "locked memory": system.at_least("locked memory", system.locked, "ulimit -l unlimited"),
    "processes": system.at_least("processes", lambda case: system.PROCESSES * case.ranks, "ulimit -u unlimited"),
    "clock": system.clock,
    "port": system.port,
    "micro-steps": storage.micro_steps,
    "data set": storage.data,
    "out_dir, shared": storage.shared,
    "out_dir, space": storage.space,
    "out_dir, speed": storage.speed,
    "NVMe": storage.nvme,
    "NVMe speed": storage.nvme_speed,
}
COLOURS = {True: "32", False: "31", None: "90"}
WORDS = {True: "ok", False: "FAIL", None: "-"}


def judge(wanted: list[Host], found: Mapping[str, Any], need: Need, ssh: str) -> Iterator[Finding]:
    """found: the facts of each host, or why there are none; ssh: how they are reached, nothing for this machine."""
    here = [host for host in wanted if not isinstance(found[host.name], str)]
    for host in wanted:
        if host not in here:
            what, _, fix = found[host.name].partition("; ")
            yield Finding("ssh", host.name, what, False, fix or f"ssh {host.name} must work by hand, and so must this")
        elif ssh:
            yield Finding("ssh", host.name, "answers", True)
    for check, rule in RULES.items():
        for host in here:
            case = Case(host, found[host.name], here[0].name, found[here[0].name], need)
            value, ok, fix = rule(case)
            yield Finding(check, host.name, value, ok, "" if ok is not False else fix)


def table(findings: list[Finding], count: int, colour: bool) -> str:
    """A line a check where the hosts agree; else one for those that are well and one for each way of not being so."""
    checks = list(dict.fromkeys(finding.check for finding in findings))
    lines = [line for check in checks for line in of_check(check, findings, count)]
    wide = max(map(len, checks))
    widest = max(len(line[2]) for line in lines)
    text = []
    for ok, check, who, value, fix in lines:
        word = WORDS[ok].ljust(4)
        word = f"\033[{COLOURS[ok]}m{word}\033[0m" if colour else word
        text.append(f"{word}  {check.ljust(wide)}  {f'{who.ljust(widest)}  ' if count > 1 else ''}{value}")
        text += [f"      {fix}"] if fix else []
    red = sum(line[0] is False for line in lines)
    where = f"{count} hosts: " if count > 1 else ""
    return "\n".join([*text, f"{where}{len(checks)} checks, {f'{red} to mend' if red else 'all well'}"])


def of_check(check: str, findings: list[Finding], count: int) -> Iterator[tuple[bool | None, str, str, str, str]]:
    """(ok, check, which hosts, value, fix)"""
    mine = [f for f in findings if f.check == check]
    well = [f for f in mine if f.ok] or [f for f in mine if f.ok is None]
    if check == "all-reduce":  # of links, each with a value of its own
        yield from ((f.ok, check, f.host, f.value, f.fix) for f in mine)
        return
    if well:
        alike = len({f.value for f in well}) == 1
        yield well[0].ok, check, several([f.host for f in well], count, alike), well[0].value, ""
    red: dict[tuple[str, str], list[str]] = {}
    for f in mine:
        if f.ok is False:
            red.setdefault((f.value, f.fix), []).append(f.host)
    for (value, fix), names in red.items():
        yield False, check, several(names, count if len(names) == count else 0), value, fix


def several(names: list[str], count: int, alike: bool = True) -> str:
    """count: of all hosts, where they need not be named."""
    if count and alike and len(names) > 1:
        return f"{'all ' * (len(names) == count)}{len(names)} hosts"
    return names[0] if len(names) == 1 else f"{names[0]} + {len(names) - 1} more"


def as_json(findings: list[Finding], wanted: list[Host]) -> str:
    return json.dumps({"hosts": [host.name for host in wanted], "findings": [asdict(f) for f in findings]}, indent=1)
