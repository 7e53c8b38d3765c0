"""The watchdog: when a rank makes no progress for hang_minutes, the run ends, and leaves behind who was stuck where.

out_dir/hang/rank_00003.txt: what the rank was doing, and the Python stacks of all its threads.
"""

import faulthandler
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

from training.distributed import Ranks
from training.errors import HUNG
from training.train_config import TrainConfig

LOOKS = 0.5  # seconds between two looks at the clock
SPREAD = 5.0  # seconds within which all ranks that still run notice, as their clocks began at the same collective


class Watchdog:
    def __init__(self, cfg: TrainConfig, ranks: Ranks):
        self.ranks, self.limit = ranks, cfg.hang_minutes * 60
        self.folder = Path(cfg.out_dir) / "hang"
        self.beats, self.doing, self.since = 0, "the start", time.monotonic()
        if self.limit and not cfg.eval_only:
            threading.Thread(target=self.watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str = "") -> None:
        """Progress was made; doing: what was reached, in words."""
        self.beats += 1
        self.doing, self.since = doing or self.doing, time.monotonic()

    def watch(self) -> None:
        while True:
            time.sleep(LOOKS)
            if time.monotonic() - self.since > self.limit:
                begun = time.time() - SPREAD
                self.write()
                time.sleep(SPREAD)
                self.report(begun)
                os._exit(HUNG)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path(self.ranks.rank).open("w") as file:
            about = {"rank": self.ranks.rank, "beats": self.beats, "after": self.doing, "time": time.time()}
            file.write(json.dumps(about) + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.txt"

    def report(self, begun: float) -> None:
        """By the lowest of the ranks that still run."""
        paths = {rank: self.path(rank) for rank in range(self.ranks.world_size)}
        found = {
            rank: path.read_text() for rank, path in paths.items() if path.exists() and path.stat().st_mtime > begun
        }
        if min(found) == self.ranks.rank:
            text = verdict(found, [rank for rank in paths if rank not in found], self.limit)
            print(f"error: {text}; all stacks: {self.folder}", file=sys.stderr, flush=True)


def verdict(found: dict[int, str], silent: list[int], limit: float) -> str:
    """Who is stuck, and where: ranks that left no stacks, else those that are behind, else all of them."""
    said = {rank: json.loads(text.splitlines()[0]) for rank, text in found.items()}
    last = max(about["beats"] for about in said.values())
    behind = [rank for rank, about in said.items() if about["beats"] < last]
    if not behind and any(map(waits, found.values())):
        behind = [rank for rank, text in found.items() if not waits(text)]
    stuck = silent or behind
    waiting = {rank: place(text) for rank, text in found.items() if rank not in stuck}
    others = "; ".join(f"{who(ranks)} in {where}" for where, ranks in grouped(waiting).items())
    head = f"no progress for {limit:.0f} s after {said[min(said)]['after']}: "
    if silent:
        return f"{head}{who(silent)} silent: stopped, or the machine or the network is; waiting for it: {others}"
    if behind:
        return f"{head}{who(behind)} stuck in {place(found[behind[0]])}; waiting for it: {others}"
    return f"{head}{others}: all as far; the network between them, or the device"


def who(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def grouped(places: dict[int, str]) -> dict[str, list[int]]:
    ranks: dict[str, list[int]] = {}
    for rank, where in places.items():
        ranks.setdefault(where, []).append(rank)
    return ranks


def waits(text: str) -> bool:
    """Whether the main thread is in a collective, or in a backward pass, which may wait in one."""
    file, _, name = (frames(text) or [("", "", "")])[0]
    return "distributed" in file or name == "_engine_run_backward"


def frames(text: str) -> list[tuple[str, str, str]]:
    """(file, line, function) of the main thread, the innermost first; faulthandler writes that thread last."""
    return re.findall(r'File "([^"]+)", line (\d+) in (\S+)', text.split("(most recent call first):")[-1])


def place(text: str) -> str:
    """The innermost frame of the main thread, and the collective and the line of this code that led there."""
    stack = frames(text)
    own = next((f"{Path(file).name}:{line}" for file, line, _ in stack if is_own(file)), "")
    torchs = [name for file, _, name in stack if "distributed" in file and not name.startswith(("_", "wrapper"))]
    inner = torchs[0] if torchs else stack[0][2] if stack else "?"
    return f"{inner}{f' ({own})' if own else ''}"


def is_own(file: str) -> bool:
    return Path(file).is_relative_to(Path(__file__).parent.parent) and "site-packages" not in file
