"""Hosts: reached by ssh, looked at before a run, and each with a launch.py at the other end."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from training.errors import UserError, listed
from training.hostfile import Host

CONNECT = 10  # seconds
TRAVELS = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHON", "VIRTUAL_ENV", "CUDA_HOME", "CC", "CXX", "OMP_", "MKL_", "MALLOC_", "THP_"),
    *("NCCL_", "GLOO_", "TORCH_", "WANDB_", "HF_", "TIKTOKEN_", "DS_"),
)
REASONS = {  # of ssh's -> the fix
    "Permission denied": "no login without a password; run ssh-copy-id {0}",
    "Connection refused": "nothing listens on its ssh port; start sshd there, or name the port: --ssh='ssh -p PORT'",
    "Host key verification failed": "its host key is unknown or has changed; run ssh {0} once by hand",
    "Could not resolve": "unknown name; write its address into the hostfile",
    "timed out": "does not answer; is it up, and is the name right?",
    "No route": "no route to it; is it up, and is the name right?",
    "unreachable": "no route to it; is it up, and is the name right?",
}
OPTIONS = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT}", "-o", "ServerAliveInterval=5"]


def environment(here: Mapping[str, str]) -> dict[str, str]:
    """What travels to the other hosts; .deepspeed_env adds to it, as with DeepSpeed's own launcher."""
    found = {name: value for name, value in here.items() if name.startswith(TRAVELS)}
    for folder in (Path.home(), Path()):
        path = folder / here.get("DS_ENV_FILE", ".deepspeed_env")
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), 1):
            name, equals, value = line.partition("=")
            if not equals or not name.isidentifier():
                raise UserError(f"{path}:{number}: {line!r}: must be NAME=VALUE, and no comment or empty line")
            found[name] = value
    return found


def write_environment(path: str, here: Mapping[str, str]) -> None:
    """As DeepSpeed's launcher reads it: .deepspeed_env, one NAME=VALUE a line, no comment and no empty line."""
    lines = [f"{name}={value}\n" for name, value in environment(here).items() if "\n" not in value]
    file = Path(path)
    file.touch(mode=0o600)  # it may hold WANDB_API_KEY
    file.write_text("".join(lines))


def remote(ssh: str, host: str, *arguments: str) -> list[str]:
    """The command that runs this Python in this folder on a host; without ssh, here."""
    if not ssh:
        return [sys.executable, *arguments]
    here = shlex.join(["cd", str(Path.cwd())]) + " && exec " + shlex.join([sys.executable, *arguments])
    return [*shlex.split(ssh), *OPTIONS, host, here]


def look(hosts: list[Host], ssh: str, port: int = 0) -> dict[str, dict[str, Any] | str]:
    """What `python -m training.machine` says on each host; a text says why one cannot be used."""
    found: dict[str, dict[str, Any] | str] = {}

    def one(host: Host) -> None:
        command = remote(ssh, host.name, "-m", "training.machine", str(port))
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            found[host.name] = "does not answer; is it up?"
            return
        found[host.name] = json.loads(done.stdout) if not done.returncode else reason(host.name, done)

    threads = [threading.Thread(target=one, args=[host]) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def reason(name: str, done: subprocess.CompletedProcess) -> str:
    lines = done.stderr.strip().splitlines() or [f"ssh ended with status {done.returncode}"]
    for words, fix in REASONS.items():
        if any(words in line for line in lines) and done.returncode == 255:
            return fix.format(name)
    if done.returncode in (1, 126, 127):
        return f"{lines[-1]}; this code and this Python ({sys.executable}) must be at the same place on every host"
    return lines[-1]


def check(hosts: list[Host], found: Mapping[str, Any]) -> None:
    """Raises UserError with every host that cannot be reached, or has other code, other packages or too few GPUs."""
    problems = [f"{name}: {text}" for name, text in found.items() if isinstance(text, str)]
    if not problems:
        first = hosts[0].name
        for host in hosts:
            here = found[host.name]
            for what in ("code", "python", "packages"):
                if here[what] != found[first][what]:
                    problems.append(f"{host.name}: {difference(what, found[first][what], here[what], first)}")
            if host is hosts[0] and not here["port"]:
                problems.append(f"{host.name}: --master_port is taken there; leave it out, and a free one is found")
            if here["gpus"] and max(host.slots) >= here["gpus"]:
                problems.append(f"{host.name}: slots={max(host.slots) + 1}, it has {here['gpus']} GPUs")
    if problems:
        raise UserError(listed(problems, "with the hosts"))


def difference(what: str, theirs: Any, here: Any, first: str) -> str:
    if isinstance(here, dict):
        names = [n for n in sorted({*theirs, *here}) if theirs.get(n) != here.get(n)]
        shown = ", ".join(f"{name} {here.get(name)} (not {theirs.get(name)})" for name in names)
    else:
        shown = f"{here} (not {theirs})"
    return f"other {what} than {first}: {shown}; bring the same onto every host"


def master(hosts: list[Host], found: Mapping[str, Any], wanted: str = "") -> str:
    """The address at which the others reach the first host."""
    name = wanted or hosts[0].name.split("@")[-1]
    try:
        address = socket.gethostbyname(name)
    except OSError:  # a name that only ssh knows
        address = found[hosts[0].name]["addresses"][0]
    if address.startswith("127.") and len(hosts) > 1:
        raise UserError(f"{name} is {address}, which leads each host to itself; set --master_addr to its address")
    return address


class Node:
    """launch.py on a host. What it prints is printed here, or goes to the file `output`."""

    def __init__(self, host: Host, ssh: str, plan: Mapping[str, Any], output: IO[bytes] | None = None):
        self.host = host
        command = remote(ssh, host.name, "launch.py", "--node")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )
        assert self.process.stdin, "it was asked for"
        self.pipe = self.process.stdin.fileno()
        self.process.stdin.write(json.dumps(plan).encode() + b"\n")
        self.process.stdin.flush()
        os.set_blocking(self.pipe, False)

    def say(self, byte: int) -> None:
        """A signal's number, to be passed on; 0: only that we are still here."""
        with contextlib.suppress(OSError):
            os.write(self.pipe, bytes([byte]))

    def drop(self) -> None:
        """It ends its ranks when it hears that nobody is there."""
        with contextlib.suppress(OSError):
            if self.process.stdin:
                self.process.stdin.close()


def start(
    hosts: list[Host],
    found: Mapping[str, Any],
    ssh: str,
    where: tuple[str, int],
    travels: Mapping[str, str],
    command: list[str],
    output: IO[bytes] | None = None,
) -> list[Node]:
    """The command on each host, a rank for each of its slots; where: the first's address and port."""
    world, first, nodes = sum(len(host.slots) for host in hosts), 0, []
    for host in hosts:
        variables = {"MASTER_ADDR": where[0], "MASTER_PORT": where[1], "WORLD_SIZE": world, "FIRST_RANK": first}
        if found[host.name]["gpus"] and ssh:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, host.slots))
        plan = {"environment": travels, "variables": variables}
        nodes.append(Node(host, ssh, {**plan, "command": [str(len(host.slots)), *command]}, output))
        first += len(host.slots)
    return nodes
