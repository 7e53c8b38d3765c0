"""The hostfile: a line a host, as DeepSpeed's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from training.errors import UserError

LINE = re.compile(r"(\S+)\s+slots=(\d+)")


@dataclass(frozen=True)
class Host:
    name: str
    slots: tuple[int, ...]  # the GPUs to use, one rank each


def read(path: str, include: str = "", exclude: str = "") -> list[Host]:
    """The hosts of an ordinary DeepSpeed hostfile. Raises UserError with file and line."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such hostfile; write one line a host: NAME slots=RANKS")
    hosts: dict[str, Host] = {}
    for number, text in enumerate(Path(path).read_text().splitlines(), 1):
        line = text.split("#")[0].strip()
        if not line:
            continue
        match = LINE.fullmatch(line)
        if not match or not int(match[2]):
            raise UserError(f"{path}:{number}: {line!r}: must be NAME slots=RANKS, RANKS 1 or more")
        if match[1] in hosts:
            raise UserError(f"{path}:{number}: {match[1]} is there twice; give it one line")
        hosts[match[1]] = Host(match[1], tuple(range(int(match[2]))))
    if not hosts:
        raise UserError(f"{path}: is empty; write one line a host: NAME slots=RANKS")
    if include:
        hosts = {name: Host(name, slots or hosts[name].slots) for name, slots in choice(include, hosts).items()}
    for name, slots in choice(exclude, hosts).items():
        left = tuple(slot for slot in hosts[name].slots if slots and slot not in slots)
        hosts[name] = Host(name, left)
    found = [host for host in hosts.values() if host.slots]
    if not found:
        raise UserError(f"--exclude={exclude}: leaves no host of {path}")
    return found


def choice(text: str, hosts: Mapping[str, Host]) -> dict[str, tuple[int, ...]]:
    """host1@host2:0,1 -> {host1: (), host2: (0, 1)}; () means all its slots."""
    chosen = {}
    for part in text.split("@") if text else []:
        name, _, slots = part.partition(":")
        if name not in hosts:
            raise UserError(f"{name}: no such host in the hostfile; it has {', '.join(hosts)}")
        numbers = tuple(int(slot) for slot in slots.split(",") if slot.isdecimal())
        if wrong := [slot for slot in numbers if slot not in hosts[name].slots]:
            raise UserError(f"{part}: {name} has no slot {wrong[0]}; it has {len(hosts[name].slots)}")
        chosen[name] = numbers
    return chosen
