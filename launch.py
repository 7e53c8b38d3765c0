"""Start the ranks of this machine, and end them together.

    python launch.py 4 train.py config/train_gpt2.py --batch_size=8

It sets what torchrun sets, so torchrun works in its place. This starts a second sooner (the launcher holds no torch),
passes on every signal, keeps the exit status of the rank that failed first (torchrun makes it 1), and adds one line
to that rank's own words, not a page. On several machines, launch_hosts.py starts it on each as `launch.py --node`: what
to start comes on stdin, and when nothing more is heard there, the ranks are ended. Without ssh, start it on each:

    python launch.py --nnodes=2 --node_rank=0 --master_addr=host1 --master_port=29500 8 train.py config/train_gpt2.py
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from itertools import takewhile
from math import inf
from pathlib import Path

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
USER_ERROR = 2  # the status of a rank whose user was told what to mend
STOPPED, LOST = 75, 77  # of a rank that saved and stopped as it was asked; of one that lost another, which is the cause
TOGETHER = (USER_ERROR, STOPPED, LOST)  # ends that come to all ranks by themselves
GRACE = 10.0  # seconds that the other ranks get to end by themselves, and then from SIGTERM to SIGKILL
SILENCE = 20.0  # seconds without a word from launch_hosts.py, which says one every second, until it counts as gone
GONE = -1  # among the signals
LIBC = ctypes.CDLL(None)


def main(argv: list[str]) -> int:
    listens, variables = argv == ["--node"], {}
    if listens:
        plan = json.loads(sys.stdin.buffer.readline())
        os.environ.update(plan["environment"])
        argv, variables = plan["command"], plan["variables"]
    options = list(takewhile(lambda argument: argument.startswith("--"), argv))
    argv = argv[len(options) :]
    if len(argv) < 2 or not argv[0].isdecimal() or int(argv[0]) < 1:
        return say(f"{' '.join(argv) or 'no arguments'}: must be RANKS SCRIPT [ARGUMENTS], RANKS 1 or more")
    if not Path(argv[1]).is_file():
        return say(f"{argv[1]}: no such script; it comes after the number of ranks")
    if options:
        several = dict(option[2:].split("=", 1) for option in options if "=" in option)
        if problem := wrong(several):
            return say(f"{problem}; it needs --nnodes=2 --node_rank=0 --master_addr=HOST --master_port=29500")
        variables = several_machines(int(argv[0]), several)
    signals: list[int] = []
    for signum in (*STOP, signal.SIGUSR1):
        signal.signal(signum, lambda signum, _: signals.append(signum))
    if listens:
        threading.Thread(target=listen, args=[signals], daemon=True).start()
    first = int(str(variables.get("FIRST_RANK", 0)))
    return watch(start(int(argv[0]), argv[1:], variables, first), signals, first)


def wrong(given: dict[str, str]) -> str:
    if given.keys() != {"nnodes", "node_rank", "master_addr", "master_port"}:
        return "over several machines"
    for name, least in (("nnodes", 1), ("node_rank", 0), ("master_port", 1)):
        if not given[name].isdecimal() or int(given[name]) < least:
            return f"--{name}={given[name]}: must be a number from {least} on"
    return "" if int(given["node_rank"]) < int(given["nnodes"]) else "--node_rank counts from 0 to nnodes - 1"


def several_machines(count: int, given: dict[str, str]) -> dict[str, object]:
    """This command on each, with its own node_rank: 0 on master_addr."""
    world, first = int(given["nnodes"]) * count, int(given["node_rank"]) * count
    where = {"MASTER_ADDR": given["master_addr"], "MASTER_PORT": given["master_port"]}
    return {**where, "WORLD_SIZE": world, "FIRST_RANK": first}


def say(problem: str) -> int:
    print(f"launch.py: {problem}", file=sys.stderr)
    return USER_ERROR


def listen(signals: list[int]) -> None:
    """Each byte from launch_hosts.py is a signal's number to pass on; 0 only says that it is still there."""
    os.set_blocking(0, False)
    heard = time.monotonic()
    while time.monotonic() - heard < SILENCE:
        with contextlib.suppress(BlockingIOError):
            data = os.read(0, 100)
            if not data:
                break
            heard = time.monotonic()
            signals.extend(byte for byte in data if byte)
        time.sleep(0.1)
    signals.append(GONE)


def start(count: int, command: list[str], variables: Mapping[str, object], first: int) -> list[subprocess.Popen]:
    """variables: of the process group; first: the first rank's number where this machine is one of several."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    shared = {
        "WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": variables.get("MASTER_PORT") or free_port(),
        "LOCAL_WORLD_SIZE": count,
        "LOCAL_SIZE": count,  # DeepSpeed's word for it
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, cores // count)),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # warns of hosts without reverse DNS
        **variables,
    }
    ranks = []
    for rank in range(count):
        own = {name: str(value) for name, value in {**shared, "RANK": first + rank, "LOCAL_RANK": rank}.items()}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-u", *command],
                env={**os.environ, **own},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches a rank once, from here; its children can be found
                preexec_fn=before_start,
            )
        )
    return ranks


def before_start() -> None:
    """Even kill -9 of the launcher leaves no rank behind that holds a GPU; SIGUSR1 waits for training/pulse.py."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def free_port() -> int:
    """A port in TIME_WAIT: rank 0 may listen on it, and for a minute no one else is given it."""
    with socket.socket() as server, socket.socket() as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        client.connect(server.getsockname())
        server.accept()[0].close()  # the side that closes first is the one that waits
        return server.getsockname()[1]


def watch(ranks: list[subprocess.Popen], signals: list[int], first: int = 0) -> int:
    """Pass signals on until all ranks have ended. The first that fails ends the others and is the status."""
    stopped = terminate = kill = inf  # when
    failed = code = 0  # the first rank that failed, and its return code
    while True:
        codes, now = [rank.poll() for rank in ranks], time.monotonic()
        if not code or (code == LOST and terminate < inf):  # who lost another rank is not the cause
            ended = [(rank, code) for rank, code in enumerate(codes) if code]
            ended.sort(key=lambda end: end[1] == LOST)
            if ended and ended[0][1] != code:
                failed, code = ended[0]
                terminate = now + GRACE if code in TOGETHER else now
                kill = terminate + GRACE
        if None not in codes:
            break
        while signals:
            signum = signals.pop(0)
            if signum == GONE:
                code, terminate, kill = code or LOST, now, now + GRACE
            elif signum not in STOP or stopped == inf:
                send(ranks, signum)
            elif now > stopped + 1:  # asked again, and not the same Ctrl-C twice: no more waiting for a save
                kill = now
            stopped = min(stopped, now) if signum in STOP else stopped
        if now >= terminate:
            send(ranks, signal.SIGTERM)
            terminate = inf
        if now >= kill:
            kill_groups(ranks)
        time.sleep(0.02)
    kill_groups(ranks if code else [])  # what the ranks have started
    told_by_rank_0 = code == USER_ERROR == codes[0]
    wanted = stopped < inf and -code in STOP
    if code and not (told_by_rank_0 or wanted or code in (STOPPED, LOST)):
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"status {code}"
        how += ": killed by hand, or for memory (see dmesg)" * (code == -signal.SIGKILL)
        say(f"rank {first + failed} ended with {how}")
    return code if code >= 0 else 128 - code


def send(ranks: list[subprocess.Popen], signum: int) -> None:
    for rank in ranks:
        rank.send_signal(signum)


def kill_groups(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; macOS: only a zombie is left
            os.killpg(rank.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
