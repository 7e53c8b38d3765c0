"""Start the ranks of one machine, and end them together. Imports the standard library only, so it starts at once.

    python -m launch.ranks 4 train.py config/train_gpt2.py --batch_size=8

With auto instead of a number: one rank per GPU, or 2 on the CPU. It sets torchrun's environment variables, forwards
every signal, exits with the status of the rank that failed first, and prints one line about it. launch.hosts starts it
on several machines over ssh; without ssh, run it on each by hand:

    python -m launch.ranks --nnodes=2 --node_rank=0 --master_addr=host1 --master_port=29500 8 train.py
"""

import argparse
import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

from launch.machine import count_gpus, free_port

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
END_NOW = -1  # among the signals: end everything, nobody is waiting for it anymore
COLLECTIVE = USER_ERROR, STOPPED, LOST = 2, 75, 77  # exit statuses (training/errors.py) that every rank reaches
GRACE_SECONDS = 10.0  # for the other ranks to end by themselves, and then again from SIGTERM to SIGKILL
HEARTBEAT_TIMEOUT_SECONDS = 20.0  # launch.hosts is lost after so long without a heartbeat; it sends one every second
LIBC = ctypes.CDLL(None)


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("launch.ranks", argparse.SUPPRESS, __doc__, formatter_class=raw)
    parser.add_argument("--nnodes", type=int, help="number of machines; each starts the same number of ranks")
    parser.add_argument("--node_rank", type=int, help="number of this machine, 0 on master_addr")
    parser.add_argument("--master_addr", help="name or address of machine 0")
    parser.add_argument("--master_port", type=int, help="a free port there")
    parser.add_argument("--node", action="store_true", help=argparse.SUPPRESS)  # the plan comes on stdin
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="RANKS SCRIPT [ARGUMENTS]")
    args = parser.parse_args(argv)
    plan = json.loads(sys.stdin.buffer.readline()) if args.node else {"command": args.command}
    os.environ.update(plan.get("environment", {}))
    count, *command = plan["command"] or [""]
    if count == "auto":
        count = str(count_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")) or 2)
    if not command or not count.isdecimal() or int(count) < 1:
        rule = "must be RANKS SCRIPT [ARGUMENTS], RANKS 1 or more, or auto: one per GPU, or 2 on the CPU"
        parser.error(f"{' '.join(args.command) or 'no arguments'}: {rule}")
    if command[0] != "-m" and not Path(command[0]).is_file():
        parser.error(f"{command[0]}: no such script; name a file after the number of ranks")
    variables = plan.get("variables") or group_variables(parser, args, int(count))
    signals = catch_signals()
    if args.node:
        timeout = plan.get("heartbeat_timeout", HEARTBEAT_TIMEOUT_SECONDS)
        threading.Thread(target=listen, args=[signals, timeout], daemon=True).start()
    return run(int(count), command, variables, signals)


def group_variables(parser: argparse.ArgumentParser, args: argparse.Namespace, count: int) -> dict[str, Any]:
    """Variables of the process group: for --nnodes and so on, or for this machine alone."""
    options = [args.nnodes, args.node_rank, args.master_addr, args.master_port]
    if options == [None] * 4:
        options = [1, 0, "127.0.0.1", free_port(host="127.0.0.1")]
    nodes, node, address, port = options
    if None in options or not 0 <= node < nodes:
        example = "--nnodes=2 --node_rank=0 --master_addr=HOST --master_port=29500"
        parser.error(f"several machines need all of {example}, and --node_rank from 0, below --nnodes")
    return {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": nodes * count, "FIRST_RANK": node * count}


def catch_signals() -> list[int]:
    """Signals to forward are appended to the list from now on."""
    signals: list[int] = []
    for signum in (*STOP_SIGNALS, signal.SIGUSR1):
        signal.signal(signum, lambda signum, _: signals.append(signum))
    return signals


def listen(signals: list[int], timeout: float) -> None:
    """Read from launch.hosts on stdin: a byte is the number of a signal to forward, or 0 for a heartbeat."""
    while select.select([0], [], [], timeout)[0] and (data := os.read(0, 100)):  # no data: the connection was closed
        signals.extend(byte for byte in data if byte)
    signals.append(END_NOW)


def run(count: int, command: list[str], variables: dict[str, Any], signals: list[int]) -> int:
    """Start `count` ranks, from FIRST_RANK on, and wait for them. Returns the status of the one that failed first."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // count)), "TORCH_CPP_LOG_LEVEL": "ERROR"}  # else DNS warnings
    shared = {**variables, "LOCAL_WORLD_SIZE": count, "LOCAL_SIZE": count}  # LOCAL_SIZE is DeepSpeed's
    env = {**defaults, **os.environ, **{name: str(value) for name, value in shared.items()}}
    ranks, argv = [], [sys.executable, "-u", *command]
    for local_rank in range(count):
        own = {**env, "RANK": str(variables["FIRST_RANK"] + local_rank), "LOCAL_RANK": str(local_rank)}
        ranks.append(Rank(argv, env=own, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare_rank))
    failed, code, stopped = watch(ranks, signals, lambda c: GRACE_SECONDS if c in COLLECTIVE else 0.0, GRACE_SECONDS)
    if code:
        for rank in ranks:
            rank.kill()  # processes that the ranks started
    explained = code in (STOPPED, LOST) or code == USER_ERROR == ranks[0].poll()  # rank 0 printed the error
    if code and not explained and not (stopped and -code in STOP_SIGNALS):
        reason = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"status {code}"
        if code == -signal.SIGKILL:
            reason += ": killed by hand, or out of memory (see dmesg)"
        print(f"launch.ranks: rank {variables['FIRST_RANK'] + failed} ended with {reason}", file=sys.stderr)
    return code if code >= 0 else 128 - code


class Rank(subprocess.Popen):
    """A rank, in its own process group: Ctrl-C reaches it through the launcher only; kill() kills its children, too."""

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; macOS: only a zombie is left
            os.killpg(self.pid, signal.SIGKILL)


def prepare_rank() -> None:
    """End the rank when the launcher is killed (Linux), and hold SIGUSR1 back until the rank handles it."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def watch(
    children: Sequence[subprocess.Popen], signals: list[int], grace: Callable[[int], float], limit: float
) -> tuple[int, int, bool]:
    """Forward signals until all children (ranks, or the launchers on several hosts) have ended.

    Returns which child failed first, its return code (0: none failed), and whether a stop signal came.
    When one fails, the others get grace(its return code) seconds to end by themselves; then they are terminated, and
    `limit` seconds later killed. A child that lost another one (LOST) is not the cause of the end. A second stop signal
    is forwarded, too, and ranks that were asked twice are killed.
    """
    first = code = handled = 0
    stop_time = terminate_time = kill_time = inf  # stop_time: that of the first stop signal
    while True:
        codes, now = [child.poll() for child in children], time.monotonic()
        failures = [(child, status) for child, status in enumerate(codes) if status]
        failures.sort(key=lambda failure: failure[1] == LOST)
        if failures and (not code or (code == LOST != failures[0][1] and terminate_time < inf)):
            first, code = failures[0]
            terminate_time = now + grace(code)
            kill_time = terminate_time + limit
        if None not in codes:
            return first, code, stop_time < inf
        for signum in signals[handled:]:
            handled += 1
            again = stop_time < inf and signum in STOP_SIGNALS
            if signum == END_NOW:
                code, terminate_time, kill_time = code or LOST, now, now + limit
            elif not again or now > stop_time + 1:  # else the same Ctrl-C, twice
                for child in children:
                    child.kill() if again and isinstance(child, Rank) else child.send_signal(signum)
            if signum in STOP_SIGNALS:
                stop_time = min(stop_time, now)
        if now >= terminate_time:
            terminate_time = inf
            for child in children:
                child.terminate()
        if now >= kill_time:
            for child in children:
                child.kill()
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
