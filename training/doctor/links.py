"""The network between hosts: a real all-reduce (all_reduce.py) over each link, and over all of them together."""

import contextlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any

from training import hosts
from training.doctor.case import Finding
from training.doctor.needs import Need
from training.errors import UserError
from training.hostfile import Host
from training.hosts import Node
from training.units import gigabytes

GRACE = 15.0  # seconds: launch.py takes up to 10 to kill its ranks
SLOW = 0.5  # of the fastest link
LEAST = 0.05  # Gbit/s, less than which no network has that is in order
NETWORK = "or name another network in GLOO_SOCKET_IFNAME (on GPUs NCCL_SOCKET_IFNAME)"
UNREACHED = f"each host must reach the other, at every port: open the firewall between them, {NETWORK}"
Group = list[Host]


@dataclass(frozen=True)
class Link:
    """A group of hosts, and their bandwidth in Gbit/s or why there is none ("what; fix")."""

    group: Group
    bandwidth: float = 0.0
    problem: str = ""

    @property
    def name(self) -> str:
        return " - ".join(h.name for h in self.group) if len(self.group) < 3 else f"all {len(self.group)} hosts"


@dataclass(frozen=True)
class Network:
    """How the hosts are reached, and for how many seconds the ranks of a link may take."""

    found: Mapping[str, Any]
    ssh: str
    address: str  # of the first host, if it is not its name's
    environment: Mapping[str, str]
    command: list[str]
    patience: float

    def measure(self, wanted: list[Host], tell: Callable[[str], None]) -> list[Link]:
        """Links without a host in common at the same time: three rounds, however many hosts there are."""
        links: list[Link] = []
        for groups in rounds(wanted):
            if not any(link.problem for link in links) or len(groups[0]) == 2:  # all together need every link
                tell("measuring " + ", ".join(Link(group).name for group in groups))
                links += self.together(wanted[0], groups)
        return links

    def together(self, first: Host, groups: list[Group]) -> list[Link]:
        running, links = [], []
        with contextlib.ExitStack() as ends:
            for group in groups:
                output = ends.enter_context(tempfile.TemporaryFile("a+b"))  # a pipe may fill up: NCCL_DEBUG=INFO
                try:
                    nodes = self.start(group, self.address if group[0].name == first.name else "", output)
                    ends.callback(end, nodes)
                    running.append((group, nodes, output))
                except (UserError, OSError) as error:
                    links.append(Link(group, problem=str(error)))
            wait([nodes for _, nodes, _ in running], self.patience)
            for group, nodes, output in running:
                late = any(node.process.poll() is None for node in nodes)
                end(nodes)
                links.append(self.result(group, output, late))
        return links

    def start(self, group: Group, address: str, output: IO[bytes]) -> list[Node]:
        where = hosts.master(group, self.found, address), self.found[group[0].name]["port"]
        return hosts.start(group, self.found, self.ssh, where, self.environment, self.command, output)

    def result(self, group: Group, output: IO[bytes], late: bool) -> Link:
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
        for line in lines:
            if line.startswith('{"ranks"'):
                return Link(group, json.loads(line)["gbit_per_second"])
        told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if late or not lines:
            told.append(f"no all-reduce within {self.patience:.0f} s")
        told += [line for line in reversed(lines) if not line.startswith("launch.py: ")] + lines
        return Link(group, problem=told[0])


def rounds(wanted: list[Host]) -> Iterator[list[Group]]:
    """One rank a host: neighbours in two rounds, then all; on a single host, all its ranks."""
    if len(wanted) == 1:
        if len(wanted[0].slots) > 1:
            yield [wanted]
        return
    each = [replace(host, slots=host.slots[:1]) for host in wanted]
    for begin in (0, 1):
        if pairs := [each[i : i + 2] for i in range(begin, len(each) - 1, 2)]:
            yield pairs
    if len(each) > 2:
        yield [each]


def wait(groups: list[list[Node]], seconds: float) -> None:
    """Until all have ended, or for so long. In a group that lost one, the others would wait in vain."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(n.process.poll() is None for nodes in groups for n in nodes):
        for nodes in groups:
            failed = any(node.process.poll() for node in nodes)
            for node in nodes:
                node.drop() if failed else node.say(0)
        time.sleep(0.2)


def end(nodes: list[Node]) -> None:
    """Nothing stays behind: launch.py ends its ranks when it hears nobody."""
    for node in nodes:
        node.drop()
    deadline = time.monotonic() + GRACE
    for node in nodes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.process.wait(max(0.0, deadline - time.monotonic()))
        node.process.kill()
        node.process.wait()


def findings(links: list[Link], need: Need) -> Iterator[Finding]:
    """Red is a link that does not work, or is much slower than the fastest: every step waits for the slowest."""
    pairs = [link.bandwidth for link in links if len(link.group) < 3]
    for link in links:
        if link.problem:
            what, _, fix = link.problem.partition("; ")
            yield Finding("all-reduce", link.name, re.sub(r" \(.*\)", "", what), False, fix or UNREACHED)
            continue
        value = f"{link.bandwidth:,.{0 if link.bandwidth >= 100 else 3}f} Gbit/s each way"
        if need.gradients():
            seconds = 8e-9 * need.gradients() * 2 * (need.ranks - 1) / need.ranks / link.bandwidth
            value += f"; a step's gradients, {gigabytes(need.gradients())}: {seconds:,.1f} s"
        slow = len(link.group) < 3 and link.bandwidth < max(LEAST, SLOW * max(pairs))
        yield Finding(
            "all-reduce", link.name, value, not slow, f"look at its cable and switch, {NETWORK}" if slow else ""
        )
