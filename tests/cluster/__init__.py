"""Hosts for tests: network namespaces on a bridge, each with its own address, host name, sshd and link."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests import needs

SSHD = "/usr/sbin/sshd"
NUMBERS = itertools.count()


def run(*command: object, check: bool = True) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
    return done.stdout


def require() -> None:
    """Skip the calling test if this machine cannot make hosts."""
    needs.require("root", "ip", "tc", "nft", "sshd", "ssh-keygen")


class Host:
    def __init__(self, number: int, tag: str, subnet: str):
        self.name, self.space, self.link = f"host{number}", f"{tag}-{number}", f"{tag}v{number}"
        self.address = subnet.format(number)
        self.sshd: subprocess.Popen | None = None

    def pids(self) -> list[int]:
        """Processes on this host, except sshd and its children."""
        found = []
        for pid in map(int, run("ip", "netns", "pids", self.space, check=False).split()):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if command and "sshd" not in command:
                found.append(pid)
        return found

    def kill(self, signum: int = signal.SIGKILL, what: str = "") -> None:
        for pid in self.pids():
            if what.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signum)

    def inside(self, *command: object, check: bool = True) -> str:
        return run("ip", "netns", "exec", self.space, *command, check=check)

    def limit(self, rate: str) -> None:
        """Limit the rate at which it sends, as tc writes it: 100mbit."""
        burst = "256kb" if rate.endswith("mbit") else "4mb"
        self.inside(
            "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", burst, "latency", "50ms"
        )

    def drop(self, percent: int) -> None:
        """Drop incoming packets at random; 0: none. (netem is missing in the kernels of small machines.)"""
        self.inside("nft", "flush", "ruleset")
        if percent:
            self.inside("nft", "add table ip lossy")
            self.inside("nft", "add chain ip lossy in { type filter hook input priority 0 ; }")
            self.inside("nft", f'add rule ip lossy in iifname "eth0" numgen random mod 100 < {percent} counter drop')

    def dropped(self) -> int:
        """Number of packets dropped so far."""
        return int(self.inside("nft", "list", "ruleset").split("counter packets ")[1].split()[0])

    def unplug(self) -> None:
        run("ip", "link", "set", self.link, "down")


class Cluster:
    """`with Cluster(folder, 2) as cluster:` makes the hosts, and removes all of them at the end."""

    def __init__(self, folder: Path, count: int):
        number = next(NUMBERS)  # several can exist at once, in several test processes
        self.folder, self.tag = folder, f"nz{os.getpid() % 100000}{chr(97 + number % 26)}"
        self.subnet = f"10.{64 + os.getpid() % 128}.{(os.getpid() // 128 * 26 + number) % 256}.{{}}"
        self.hosts = [Host(number, self.tag, self.subnet) for number in range(1, count + 1)]
        self.ssh = f"ssh -F {folder}/ssh_config"

    def __enter__(self) -> "Cluster":
        try:
            sweep()
            self.keys()
            run("ip", "link", "add", self.tag, "type", "bridge")
            run("ip", "addr", "add", f"{self.subnet.format(254)}/24", "dev", self.tag)
            run("ip", "link", "set", self.tag, "up")
            for host in self.hosts:
                self.make(host)
            for host in self.hosts:
                self.wait_for(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def keys(self) -> None:
        for name in ("host_key", "user_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name)
        key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text("".join(f"{h.name},{h.address} {key}" for h in self.hosts))
        names = "".join(f"Host {h.name}\n  HostName {h.address}\n" for h in self.hosts)
        own = f"UserKnownHostsFile {self.folder}/known_hosts\nIdentityFile {self.folder}/user_key\nIdentitiesOnly yes\n"
        (self.folder / "ssh_config").write_text(f"{names}Host *\nUser root\nStrictHostKeyChecking yes\n{own}")
        keys = f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/user_key.pub\n"
        (self.folder / "sshd_config").write_text(f"{keys}StrictModes no\nUsePAM no\nPidFile none\nMaxStartups 100\n")
        wrapper = self.folder / "bin" / "ssh"  # for programs that call ssh themselves
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)

    def make(self, host: Host) -> None:
        etc = Path("/etc/netns") / host.space  # ip netns exec puts these over /etc
        etc.mkdir(parents=True)
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{h.address} {h.name}\n" for h in self.hosts))
        run("ip", "netns", "add", host.space)
        run("ip", "link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.space)
        run("ip", "link", "set", host.link, "master", self.tag, "up")
        inside = ("ip", "-n", host.space)
        run(*inside, "addr", "add", f"{host.address}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "link", "set", "lo", "up")
        Path("/run/sshd").mkdir(exist_ok=True)
        listen = f"hostname {host.name} && exec {SSHD} -D -f {self.folder}/sshd_config -o ListenAddress={host.address}"
        command = ["ip", "netns", "exec", host.space, "unshare", "--uts", "sh", "-c", listen]
        log = (self.folder / f"{host.name}.sshd").open("w")
        host.sshd = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait_for(self, host: Host) -> None:
        for _ in range(100):
            done = subprocess.run([*self.ssh.split(), host.name, "hostname"], capture_output=True, text=True)
            if done.stdout.strip() == host.name:
                return
            time.sleep(0.1)
        raise AssertionError(f"{host.name} cannot be reached: {done.stderr}")

    def hostfile(self, slots: int, by: str = "name", hosts: list[Host] | None = None) -> Path:
        """hosts: some of them, by default all."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{getattr(host, by)} slots={slots}\n" for host in hosts or self.hosts))
        return path

    def left(self) -> dict[str, list[int]]:
        """Processes that still run, by host."""
        return {host.name: host.pids() for host in self.hosts if host.pids()}

    def __exit__(self, *_: object) -> None:
        clear(self.tag)
        for host in self.hosts:
            if host.sshd:
                host.sshd.wait()


def clear(tag: str) -> None:
    """Remove everything that a cluster made."""
    for space in [line.split()[0] for line in run("ip", "netns", "list").splitlines()]:
        if space.startswith(f"{tag}-"):
            for pid in run("ip", "netns", "pids", space, check=False).split():
                subprocess.run(["kill", "-9", pid], capture_output=True)
            run("ip", "netns", "del", space, check=False)
            run("ip", "link", "del", space.replace("-", "v"), check=False)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
    run("ip", "link", "del", tag, check=False)


def sweep() -> None:
    """Remove what a killed test left behind."""
    tags = set(re.findall(r"^(nz(\d+)[a-z])-", run("ip", "netns", "list"), re.M))
    for tag, pid in tags:
        if not Path(f"/proc/{pid}").exists():
            clear(tag)
