"""Questions to a machine and its answers, a JSON line each, over ssh. When nobody asks any more, it ends by itself.

    python -m training.doctor.interview

is the one that is asked.
"""

import contextlib
import json
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from training import hosts
from training.doctor import checkup
from training.errors import UserError
from training.hostfile import Host

PATIENCE = 90.0  # seconds for an answer: disks are measured for it
OPEN: list[Any] = []  # files that are gone when this process ends


class Interview:
    """The asker's end."""

    def __init__(self, host: Host, ssh: str):
        self.host = host
        command = hosts.remote(ssh, host.name, "-m", "training.doctor.interview")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def ask(self, what: str, **about: Any) -> Any:
        """Raises UserError with the reason where no answer comes."""
        question, answers = self.process.stdin, self.process.stdout
        assert question and answers, "both were asked for"
        with contextlib.suppress(BrokenPipeError):
            question.write(json.dumps([what, about]) + "\n")
            question.flush()
        came = select.select([answers], [], [], PATIENCE)[0]
        if not came or not (line := answers.readline()):
            raise UserError(self.reason())
        try:
            return json.loads(line)
        except ValueError:
            raise UserError(f"its shell prints {line.strip()!r}; let ~/.bashrc print nothing for ssh") from None

    def reason(self) -> str:
        try:
            _, said = self.process.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            return "does not answer; is it up, and is its disk?"
        ended = subprocess.CompletedProcess(self.process.args, self.process.returncode, stderr=said)
        return hosts.reason(self.host.name, ended)

    def end(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self.process.stdin:
                self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()


def examine(wanted: list[Host], ssh: str, about: Mapping[str, Any]) -> dict[str, dict[str, Any] | str]:
    """The facts of each host (see checkup.facts); a text says why there are none.

    With them its clock's "skew" against ours, in seconds, and whether its out_dir is "shared" with the first host: None
    where that is unknown.
    """

    def one(talk: Interview) -> dict[str, Any] | str:
        try:
            return {"skew": skew(talk), "shared": None, **talk.ask("facts", **about)}
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(wanted)) as threads, contextlib.ExitStack() as ends:
        talks = [Interview(host, ssh) for host in wanted]
        for talk in talks:
            ends.callback(talk.end)
        found = dict(zip((host.name for host in wanted), threads.map(one, talks), strict=True))
        compare(talks, found, about["out_dir"])
    return found


def skew(talk: Interview) -> float:
    """By the quickest of a few: half of the way there and back is all that it can be wrong by."""
    seen = []
    for _ in range(4):
        begun = time.time()
        theirs = talk.ask("clock")
        ended = time.time()
        seen.append((ended - begun, theirs - (begun + ended) / 2))
    return min(seen)[1]


def compare(talks: Iterable[Interview], found: dict[str, dict[str, Any] | str], out_dir: str) -> None:
    """A file that the first host writes into out_dir must be there for the others."""
    path = None
    for talk in talks:
        facts = found[talk.host.name]
        if isinstance(facts, dict):
            try:
                if path is None:
                    path = talk.ask("write", folder=out_dir)
                    facts["shared"] = bool(path) or None
                elif path:
                    facts["shared"] = talk.ask("seen", path=path)
            except UserError as error:
                found[talk.host.name] = str(error)


def write(folder: str) -> str:
    """The path of a new file; an empty one where none can be written, which the measuring of the disk has said."""
    try:
        file = tempfile.NamedTemporaryFile(dir=checkup.existing(folder), prefix=".doctor-")  # noqa: SIM115
    except OSError:
        return ""
    OPEN.append(file)
    return file.name


ANSWERS: dict[str, Callable[..., Any]] = {
    "clock": time.time,
    "facts": checkup.facts,
    "write": write,
    "seen": lambda path: Path(path).exists(),
}


def hear(questions: queue.SimpleQueue) -> None:
    for line in iter(sys.stdin.readline, ""):
        questions.put(json.loads(line))
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def main() -> None:
    """The end that is asked. It may be in the middle of an answer when the asker goes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    questions: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=hear, args=[questions], daemon=True).start()
    try:
        while True:
            what, about = questions.get()
            print(json.dumps(ANSWERS[what](**about)), flush=True)
    finally:
        for file in OPEN:
            file.close()


if __name__ == "__main__":
    main()
