"""Start N ranks of a script on this machine, and end them together.

    python launch.py 4 train.py config/train_gpt2.py --batch_size=8

It sets what torchrun sets, so torchrun works in its place, and over several nodes it is the one to take. On one
node this starts a second sooner (the launcher holds no torch), passes on every signal, keeps the exit status of
the rank that failed first (torchrun makes it 1), and adds one line to that rank's own words, not a page.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from math import inf
from pathlib import Path

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
USER_ERROR = 2  # the status of a rank whose user was told what to mend
GRACE = 10.0  # seconds that the other ranks get to end by themselves, and then from SIGTERM to SIGKILL
LIBC = ctypes.CDLL(None)


def main(argv: list[str]) -> int:
    if len(argv) < 2 or not argv[0].isdecimal() or int(argv[0]) < 1:
        return say(f"{' '.join(argv) or 'no arguments'}: must be RANKS SCRIPT [ARGUMENTS], RANKS 1 or more")
    if not Path(argv[1]).is_file():
        return say(f"{argv[1]}: no such script; it comes after the number of ranks")
    signals: list[int] = []
    for signum in (*STOP, signal.SIGUSR1):
        signal.signal(signum, lambda signum, _: signals.append(signum))
    return watch(start(int(argv[0]), argv[1:]), signals)


def say(problem: str) -> int:
    print(f"launch.py: {problem}", file=sys.stderr)
    return USER_ERROR


def start(count: int, command: list[str]) -> list[subprocess.Popen]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    shared = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "LOCAL_SIZE": count,  # DeepSpeed's word for it
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, cores // count)),
    }
    ranks = []
    for rank in range(count):
        own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-u", *command],
                env={**os.environ, **own},
                start_new_session=True,  # Ctrl-C reaches a rank once, from here; its children can be found
                preexec_fn=end_with_launcher if sys.platform == "linux" else None,
            )
        )
    return ranks


def end_with_launcher() -> None:
    """Even kill -9 of the launcher leaves no rank behind that holds a GPU."""
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_port() -> int:
    """A port in TIME_WAIT: rank 0 may listen on it, and for a minute no one else is given it."""
    with socket.socket() as server, socket.socket() as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        client.connect(server.getsockname())
        server.accept()[0].close()  # the side that closes first is the one that waits
        return server.getsockname()[1]


def watch(ranks: list[subprocess.Popen], signals: list[int]) -> int:
    """Pass signals on until all ranks have ended. The first that fails ends the others and is the status."""
    stopped = terminate = kill = inf  # when
    failed = code = 0  # the first rank that failed, and its return code
    while True:
        codes, now = [rank.poll() for rank in ranks], time.monotonic()
        if not code and any(codes):
            failed, code = next((rank, code) for rank, code in enumerate(codes) if code)
            # A user's error ends all ranks, but rank 0, which prints it, may not be there yet.
            terminate = now + GRACE if code == USER_ERROR else now
            kill = terminate + GRACE
        if None not in codes:
            break
        while signals:
            signum = signals.pop(0)
            if signum not in STOP or stopped == inf:
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
    if not code:
        return 0
    kill_groups(ranks)  # what the ranks have started
    told_by_rank_0 = code == USER_ERROR == codes[0]
    wanted = stopped < inf and -code in STOP
    if not (told_by_rank_0 or wanted):
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"status {code}"
        say(f"rank {failed} ended with {how}")
    return code if code > 0 else 128 - code


def send(ranks: list[subprocess.Popen], signum: int) -> None:
    for rank in ranks:
        rank.send_signal(signum)


def kill_groups(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; macOS: only a zombie is left
            os.killpg(rank.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
