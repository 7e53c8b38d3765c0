"""Start a run on every host of a DeepSpeed hostfile, watch it from here, and restart it when a host is lost.

    python -m launch.hosts --hostfile=hostfile train_deepspeed.py config/train_gpt2_deepspeed_zero2.py
    HOSTFILE=hostfile ./launch_deepspeed_zero2.sh --restarts=5 config/train_gpt2.py --resume=auto

Each host runs launch.ranks in this folder with this Python, reached by ssh without a password. It is sent a heartbeat
every second. When the heartbeats stop, it ends its ranks, so nothing is left running on a host that is out of reach.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import IO, Any, cast

from data.errors import check_types
from launch.machine import SAME
from launch.ranks import catch_signals, watch
from training.errors import LOST, STOPPED, UserError, list_problems

HEARTBEAT_SECONDS = 1.0
GRACE_SECONDS = 12.0  # for the other hosts to end by themselves after the first has failed
KILL_SECONDS = 40.0  # and then until their connections are cut; launch.ranks takes up to 20 to kill its ranks
CONNECT_SECONDS, ANSWER_SECONDS = 10, 90.0
SSH_LOST = 255  # ssh's exit status when the connection fails
NO_RESTART = (0, 2, STOPPED)  # a restart cannot change these ends
FORWARDED_ENV = (  # prefixes of the variables that are set on every host
    *("PATH", "LD_LIBRARY_PATH", "PYTHON", "VIRTUAL_ENV", "CUDA_", "CC", "CXX", "OMP_", "MKL_", "MALLOC_", "THP_"),
    *("NCCL_", "GLOO_", "TORCH_", "WANDB_", "HF_", "TIKTOKEN_", "DS_"),
)
SSH_OPTIONS = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", "-o", "ServerAliveInterval=5"]
HOST_NAME = r"(\w[\w.-]*@)?[\w:][\w.:%-]*"  # also an address; ssh takes what begins with - for an option
ANSWER = {**dict.fromkeys(SAME, str), "gpus": int, "address": str, "port": int}  # of launch.machine
ANSWER_CHARACTERS = 10**6  # at most, in a line
Slots = dict[str, int]  # by host, in the order of the hostfile: how many ranks it runs, one per GPU
Plan = dict[str, Any]  # what launch.ranks --node reads on a host
Answers = dict[str, Any]  # by host: the dict of its JSON, or a str that says why there is none


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    usage = "python -m launch.hosts --hostfile=FILE [OPTIONS] SCRIPT [ARGUMENTS]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=raw, allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument("--restarts", type=int, default=0, help="how often to restart, on the hosts that still answer")
    args, command = parser.parse_known_args()  # its options may also stand among those of the script
    if args.restarts < 0 or not command:
        raise UserError(f"{shlex.join(sys.argv[1:]) or 'no arguments'}: must be {usage}, --restarts 0 or more")
    signals = catch_signals()
    hosts = read_hostfile(args.hostfile or "hostfile")
    answers = ask(hosts, args.ssh, ["-m", "launch.machine"])
    check(hosts, answers)
    for attempt in range(args.restarts + 1):
        plans = make_plans(hosts, answers, args.master_addr, command)
        nodes = [Node(name, args.ssh, plan) for name, plan in plans.items()]
        failed, status, _ = watch(nodes, signals, lambda code: GRACE_SECONDS, KILL_SECONDS)
        if status not in NO_RESTART:
            reason = "the connection was lost" if status == SSH_LOST else f"ended with status {status}"
            print(f"launch.hosts: {nodes[failed].host}: {reason}", file=sys.stderr)
        if status in NO_RESTART or signals or attempt == args.restarts:
            break
        answers = ask(hosts, args.ssh, ["-m", "launch.machine"])
        hosts = {host: slots for host, slots in hosts.items() if not isinstance(answers[host], str)}
        if not hosts:
            raise UserError("no host of the hostfile answers, so the run cannot be restarted; see why ssh fails")
        if "--resume=auto" not in command:
            command.append("--resume=auto")
        print(f"launch.hosts: restart {attempt + 1} of {args.restarts}, on {', '.join(hosts)}", flush=True)
    return LOST if status < 0 or status == SSH_LOST else status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which hosts to use, and how to reach them."""
    parser.add_argument("--hostfile", default="", help="one line per host: NAME slots=RANKS")
    parser.add_argument("--ssh", default="ssh", help="ssh with its options: 'ssh -p 2222 -i key -l user'")
    parser.add_argument("--master_addr", default="", help="address of the first host, as the others reach it")


def read_hostfile(path: str) -> Slots:
    """Raises UserError with file and line."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such hostfile; write one line per host: NAME slots=RANKS")
    hosts: Slots = {}
    for number, text in enumerate(Path(path).read_text("utf-8-sig", errors="replace").splitlines(), 1):
        line = text.split("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9][0-9]{0,4})", line)
        if not match or not re.fullmatch(HOST_NAME, match[1], re.ASCII) or match[1] in hosts:
            rule = "must be NAME slots=RANKS, RANKS 1 to 99999; NAME, each once: HOST, USER@HOST, address, in ASCII"
            raise UserError(f"{path}:{number}: {line!r}: {rule}")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"{path}: is empty; write one line per host: NAME slots=RANKS")
    return hosts


def forwarded_environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(FORWARDED_ENV)}


def remote_command(ssh: str, host: str, *arguments: str) -> list[str]:
    """Command that runs this Python in this folder on a host; on this machine if `ssh` is empty."""
    if not ssh:
        return [sys.executable, *arguments]
    try:
        words = shlex.split(ssh)
    except ValueError:  # no closing quotation
        words = []
    if not words or not shutil.which(words[0]):
        raise UserError(f"--ssh={ssh}: must be a program and its options, as in a shell: --ssh='ssh -p 2222 -i key'")
    command = shlex.join(["cd", str(Path.cwd())]) + " && exec " + shlex.join([sys.executable, *arguments])
    return [*words, *SSH_OPTIONS, host, command]


def ask(hosts: Slots, ssh: str, arguments: list[str], requests: Mapping = {}, types: dict = ANSWER) -> Answers:
    """Run Python on every host at once, and collect the line of JSON that it prints.

    requests: by host, the JSON of its first line of stdin. stdin is closed when all have answered or ended; the program
    may wait for that. types: those of the values that it prints.
    """
    streams: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"text": True, "errors": "replace"}
    commands = [remote_command(ssh, host, *arguments) for host in hosts]
    processes: list[Any] = [subprocess.Popen(command, **streams, start_new_session=True) for command in commands]
    with ThreadPoolExecutor(max(1, len(hosts))) as threads:
        try:
            lines = [json.dumps(requests.get(host)) for host in hosts]
            return dict(zip(hosts, threads.map(read_answer, hosts, processes, lines, repeat(types)), strict=True))
        finally:
            for process in processes:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                process.kill()


def read_answer(name: str, process: Any, request: str, types: dict) -> dict[str, Any] | str:
    """The JSON that a host prints, or why it gave none: the problem, a semicolon, the fix. process: a Popen."""
    timer = threading.Timer(ANSWER_SECONDS, process.kill)
    timer.start()
    with contextlib.suppress(OSError):
        print(request, file=process.stdin, flush=True)
    printed = ""
    while line := process.stdout.readline(ANSWER_CHARACTERS):
        with contextlib.suppress(ValueError, RecursionError):
            if not check_types(answer := json.loads(line), types):
                timer.cancel()
                return answer
        printed = line.strip()[:80]  # by a ~/.bashrc, or by other code
    errors = [line for line in process.stderr.read().strip().splitlines() if not line.startswith("launch.ranks: ")]
    status = process.wait()
    timer.cancel()
    if status < 0:
        return f"no answer within {ANSWER_SECONDS:.0f} s; is it up, and are its disks?"
    other = f"printed {printed!r} instead of an answer" if printed else f"ssh ended with status {status}"
    fix = f"`ssh {name}` must work without a password (ssh-copy-id {name}) and find the same code and Python there"
    return f"{errors[-1] if errors else other}; {fix}"


def check(hosts: Slots, answers: Answers) -> None:
    """Raise UserError listing every host that is out of reach or has too few GPUs. The ranks compare code and data."""
    problems = [f"{name}: {answer}" for name, answer in answers.items() if isinstance(answer, str)]
    for host, slots in hosts.items() if not problems else []:
        gpus = answers[host]["gpus"]
        if 0 < gpus < slots:
            problems.append(f"{host}: slots={slots}, but it has {gpus} GPUs")
    if problems:
        raise UserError(list_problems(problems, "with the hosts"))


def master_address(hosts: Slots, answers: Answers, name: str = "") -> str:
    """Address at which the other hosts reach the first one. name: its name or address, if not as in the hostfile."""
    first = next(iter(hosts))
    name = name or first.split("@")[-1]
    try:
        address = socket.gethostbyname(name)
    except (OSError, UnicodeError):  # a name that only ssh knows
        address = answers[first]["address"]
    if not address or (address.startswith("127.") and len(hosts) > 1):
        problem = f"is {address}, so each host would reach itself" if address else "has no known address"
        raise UserError(f"{name} {problem}; set --master_addr to its address")
    return address


def make_plans(hosts: Slots, answers: Answers, address: str, command: list[str]) -> dict[str, Plan]:
    """By host: environment (the same everywhere), variables, and the command that starts one rank per slot."""
    environment, plans, first_rank = forwarded_environment(os.environ), {}, 0
    master, port = master_address(hosts, answers, address), answers[next(iter(hosts))]["port"]
    shared: Plan = {"MASTER_ADDR": master, "MASTER_PORT": port, "WORLD_SIZE": sum(hosts.values())}
    for host, slots in hosts.items():
        variables = {**shared, "FIRST_RANK": first_rank}
        plans[host] = {"environment": environment, "variables": variables, "command": [str(slots), *command]}
        first_rank += slots
    return plans


class Node(subprocess.Popen):
    """launch.ranks on a host, as a local process whose signals are sent over ssh. poll() sends the heartbeats."""

    def __init__(self, host: str, ssh: str, plan: Plan):
        self.host, self.heartbeat_time = host, 0.0
        command = remote_command(ssh, host, "-m", "launch.ranks", "--node")
        super().__init__(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
        self.pipe = cast(IO[bytes], self.stdin)
        with contextlib.suppress(BrokenPipeError):  # it has ended already; watch() sees how
            self.pipe.write(json.dumps(plan).encode() + b"\n")
        os.set_blocking(self.pipe.fileno(), False)

    def poll(self) -> int | None:
        if time.monotonic() > self.heartbeat_time + HEARTBEAT_SECONDS:
            self.heartbeat_time = time.monotonic()
            self.send_signal(0)
        return super().poll()

    def send_signal(self, signum: int) -> None:
        """Have launch.ranks forward a signal; 0 is a heartbeat."""
        with contextlib.suppress(OSError, ValueError):  # it has ended
            self.pipe.write(bytes([signum]))

    def terminate(self) -> None:
        """Close the connection's input; launch.ranks then ends its ranks."""
        self.pipe.close()

    def kill(self) -> None:
        super().send_signal(signal.SIGKILL)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, OSError) as error:  # OSError: no ssh, or a file that cannot be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
