"""One launch: its processes, what they said, when the first step was done, and why it failed where it did."""

import re
import subprocess
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from training.memory import FULL

OUT_OF_MEMORY, FAILED = "out of memory", "failed"


@dataclass
class Ended:
    status: int
    said: list[str] = field(default_factory=list)  # lines
    first_step_s: float | None = None  # from the start of the processes to the end of the first step
    seconds: float = 0.0


@dataclass(frozen=True)
class Failure:
    status: str  # OUT_OF_MEMORY or FAILED
    error: str  # one line


def run(command: list[str], first_step: str, cwd: Path | None = None) -> Ended:
    """To its end. first_step: how the line begins that it says after its first step."""
    since, ended = time.perf_counter(), Ended(0)
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout or ():
            ended.said.append(line.rstrip())
            if ended.first_step_s is None and line.startswith(first_step):
                ended.first_step_s = time.perf_counter() - since
        ended.status = process.wait()
    finally:  # Ctrl-C: the launcher ends its ranks
        if process.poll() is None:
            process.terminate()
            process.wait()
    ended.seconds = time.perf_counter() - since
    return ended


def failure(ended: Ended) -> Failure | None:
    """What a failed launch said, in a line: its own message, else the end of a traceback, else the launcher's."""
    if not ended.status:
        return None
    lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in ended.said if line.strip()]  # of torch's tracebacks
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt): ", line)]
    launcher = [line for line in lines if line.startswith(("launch.py: ", "launch_hosts.py: "))]
    words = [*(lines[number].removeprefix("error: ") for number in errors), *raised, *launcher, *lines[-1:]]
    text = words[0] if words else f"ended with status {ended.status}, without a word"
    if errors and re.match(r"\d+ problems? in", text) and len(lines) > errors[0] + 1:
        text = lines[errors[0] + 1]  # its first problem
    full = next((line for line in lines if any(full in line for full in FULL)), "")
    if full or "SIGKILL" in text:
        advice = [after for before, after in pairwise(lines) if before.startswith("to try")]
        return Failure(OUT_OF_MEMORY, "; try ".join([(full or text).removeprefix("error: "), *advice[:1]]))
    return Failure(FAILED, text)
