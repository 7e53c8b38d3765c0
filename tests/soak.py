"""A run that is disturbed at random, again and again, compared with runs that nothing disturbs.

    python -m tests.soak --hours=1
    python -m tests.soak --hours=0.1 --seed=7 --out=/tmp/soak

Its ranks and its launcher are killed, it is asked to stop, a rank hangs, its newest checkpoint is damaged, its disk
gets full; each time it is started again with --resume=auto. For the first third of the time it is DDP on 2 ranks, and
its losses must be bit-identical to those of an undisturbed run. After that each start may have another strategy and
number of ranks, and its losses must be those of one process, to 1e-5. It ends with a table, and with status 1 if
anything failed; FOLDER then holds what was printed and the run.
"""

import argparse
import errno
import fcntl
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.running import ROOT, TINY, command, losses, start_process, started_with, strategy_settings, train
from tests.words import words
from training.checkpoint import Checkpoints, find_corruption, find_damage

INTERVAL = 25  # steps between checkpoints
SETTINGS: dict[str, Any] = {
    **{"n_layer": 1, "block_size": 16, "batch_size": 2, "gradient_accumulation_steps": 6, "eval_iters": 1},
    **{"learning_rate": 3e-4, "min_lr": 1e-5, "lr_decay_iters": 2000, "eval_interval": INTERVAL},
}
Layout = tuple[str, int]  # strategy, ranks
SINGLE, FIRST = ("single", 1), ("ddp", 2)
LAYOUTS: list[Layout] = [SINGLE, FIRST, ("ddp", 3)]
LAYOUTS += [(strategy, ranks) for strategy in ("fsdp", "zero1", "zero2", "zero3") for ranks in (1, 2, 3)]
TOLERANCE = 1e-5  # of any strategy; 0 of the same one
# What is done to the run, and the exit statuses that are right then: 75 stopped, 76 hung, 128 + a signal's number.
DISTURBANCES = {
    **{"kill a rank": (137,), "kill the launcher": (137,), "flip a bit": (137,), "truncate": (137,)},
    **{"stop": (75, 143), "hang": (76,), "full disk": (2,)},  # 143: while it starts
}
NEED_RANKS = ("kill the launcher", "hang")
MOMENTS = {"in training": 6, "while saving": 2, "while starting": 1}  # with their weights
MOST_STEPS = 200  # of a start, until it is disturbed
PATIENCE_SECONDS = 300  # for a start, a number of steps, and an end
SEGMENT = 200  # steps that a reference is trained at a time
MARK = f"soak-{os.getpid()}"  # in the environment of all processes of the run


@dataclass
class Start:
    """One start of the run, until it has ended."""

    layout: Layout
    disturbance: str
    moment: str
    newest: int  # the step of the newest undamaged checkpoint before it; 0: there is none
    suspects: list[str]  # damaged checkpoints that are newer
    background: bool  # --async_save
    log: Path
    status: int = 0
    problems: list[str] = field(default_factory=list)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def resumed(self) -> int | None:
        """The step from which it resumes; None: it has not said so."""
        match = re.search(r"; resuming \S*step_(\d+)", self.output())
        return int(match[1]) if match else None

    def reached(self) -> int:
        """The last step that it has printed; -1: none."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 20_000))
            steps = re.findall(rb"step +([\d,]+)/\S* \([^)]*\) loss ", file.read())
        return int(steps[-1].replace(b",", b"")) if steps else -1


class Soak:
    def __init__(self, folder: Path, seconds: float, seed: int):
        self.folder, self.run, self.data = folder, folder / "run", words(folder / "words")
        self.run.mkdir()
        self.begin, self.seconds, self.chance = time.monotonic(), seconds, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.differences = {FIRST: 0.0, SINGLE: 0.0}  # largest, from each reference
        self.references: dict[Layout, dict[int, float]] = {FIRST: {}, SINGLE: {}}
        self.layout, self.switch_step = FIRST, math.inf  # from there on, steps are not all of the first strategy
        self.reported: set[tuple[Layout, int]] = set()  # steps whose loss differs
        self.startup_seconds = 10.0
        self.failed, self.ids = 0, set[str]()  # starts that failed one after the other; process ids and ports
        mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(self.run)]
        mounted = subprocess.run(mount, capture_output=True, text=True)
        self.small_disk = mounted.returncode == 0
        if not self.small_disk:
            print(f"without full disks, for which this machine must mount a tmpfs: {mounted.stderr.strip()}")

    def close(self) -> None:
        for pid in started_with(f"MARK={MARK}"):
            os.kill(int(pid), signal.SIGKILL)
        if self.small_disk:
            if self.counts["failures"]:
                shutil.copytree(self.run, self.folder / "run_at_the_end")
            subprocess.run(["umount", "-l", self.run], check=True)

    def soak(self) -> None:
        """Every disturbance comes up as often as the others, and so does every strategy after the first third."""
        disturbances, layouts = list[str](), list[Layout]()
        while self.time_left() > 0 and self.failed < 5:
            disturbances = disturbances or self.shuffled(name for name in DISTURBANCES if self.possible(name))
            disturbance, layout = disturbances.pop(), FIRST
            if self.time_left() < self.seconds * 2 / 3:
                layouts = layouts or self.shuffled(LAYOUTS)
                layout = layouts.pop()
            if layout[1] == 1 and disturbance in NEED_RANKS:
                disturbance = "kill a rank"
            moment = self.chance.choices(list(MOMENTS), list(MOMENTS.values()))[0]
            self.start(layout, disturbance, "in training" if disturbance in ("hang", "full disk") else moment)
        self.start(SINGLE, "", "")  # resumes what the last disturbance left

    def shuffled(self, values: Iterable[Any]) -> list[Any]:
        return sorted(values, key=lambda _: self.chance.random())

    def possible(self, disturbance: str) -> bool:
        return self.small_disk or disturbance != "full disk"

    def time_left(self) -> float:
        return self.begin + self.seconds - time.monotonic()

    def valid(self) -> list[int]:
        """Steps of the undamaged checkpoints."""
        finished = Checkpoints(str(self.run)).finished()
        return [int(path.name[5:]) for path in finished if not (find_damage(path) or find_corruption(path))]

    def start(self, layout: Layout, disturbance: str, moment: str) -> None:
        """Start the run, disturb it, wait for its end, and check what is left."""
        newest = max(self.valid(), default=0)
        suspects = [path.name for path in Checkpoints(str(self.run)).finished() if int(path.name[5:]) > newest]
        background, number = self.chance.random() < 0.3, self.counts["starts"] + 1
        log = self.folder / f"output_{number}.txt"
        start = Start(layout, disturbance, moment, newest, suspects, background, log)
        self.counts.update(["starts", disturbance, *["switches"] * (layout != self.layout)])
        if layout != FIRST or self.switch_step < math.inf:
            self.switch_step = min(self.switch_step, newest)
        self.layout = layout
        process = self.launch(start)
        try:
            self.disturb(start, process)
            self.wait(lambda: process.poll() is not None)
        except TimeoutError as error:
            start.problems.append(str(error))
            process.kill()
        code = process.wait()
        start.status = code if code >= 0 else 128 - code
        (self.run / "filler").unlink(missing_ok=True)
        for check in (self.check_end, self.check_resumed, self.check_saved, self.check_losses):
            check(start)
        if disturbance in ("flip a bit", "truncate"):
            self.damage(disturbance)
        self.report(start)

    def launch(self, start: Start) -> subprocess.Popen:
        strategy, ranks = start.layout
        script = "train_deepspeed.py" if strategy.startswith("zero") else "train.py"
        settings = {**TINY, **SETTINGS, **strategy_settings(strategy, self.folder)}
        settings |= {"dataset": self.data, "out_dir": self.run, "resume": "auto", "async_save": start.background}
        settings |= {"hang_minutes": 0.1 if start.disturbance == "hang" else 10.0}
        settings |= {"max_iters": 1_000_000 if start.disturbance else start.newest + INTERVAL}
        line = command(script, ranks=ranks if ranks > 1 else 0, **settings)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MARK": MARK}
        with start.log.open("w") as output:
            fresh = start.disturbance == "kill the launcher" or self.chance.random() < 0.1
            return start_process(line, fresh, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def wait(self, condition: Callable[[], bool], pause: float = 0.02, seconds: float = PATIENCE_SECONDS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"nothing happened within {seconds} s")
            time.sleep(pause)

    def disturb(self, start: Start, process: subprocess.Popen) -> None:
        """At the start's moment; does nothing if the run ended before."""
        if start.disturbance:
            self.wait_for_moment(start, lambda: process.poll() is not None)
        if start.disturbance == "full disk":
            self.fill_disk()
        elif start.disturbance == "stop":
            process.terminate()
        elif start.disturbance == "kill the launcher" or (start.disturbance and start.layout[1] == 1):
            process.kill()
        elif start.disturbance:
            self.wait(lambda: len(self.ranks()) >= start.layout[1] or process.poll() is not None, 0.1)
            for pid in self.chance.sample(self.ranks(), 1) if process.poll() is None else []:
                os.kill(pid, signal.SIGSTOP if start.disturbance == "hang" else signal.SIGKILL)

    def wait_for_moment(self, start: Start, ended: Callable[[], bool]) -> None:
        if start.moment == "while starting":
            time.sleep(self.chance.uniform(0, self.startup_seconds))
            return
        since, target = time.monotonic(), start.newest + self.chance.randrange(MOST_STEPS)
        self.wait(lambda: start.reached() >= 0 or ended())
        self.startup_seconds = time.monotonic() - since
        self.wait(lambda: start.reached() >= target or ended())
        if start.moment == "while saving":
            checkpoints = self.run / "checkpoints"
            self.wait(lambda: any(checkpoints.glob("unfinished_*")) or ended(), 0.001)
            time.sleep(self.chance.uniform(0, 0.01))

    def ranks(self) -> list[int]:
        """Process ids of the run's ranks."""
        pids = []
        for pid in started_with(f"MARK={MARK}"):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if re.search(r"\0RANK=\d", f"\0{environment}"):
                pids.append(int(pid))
                self.ids |= {pid, *re.findall(r"\0MASTER_PORT=(\d+)", environment)}
        return pids

    def fill_disk(self) -> None:
        try:
            with (self.run / "filler").open("wb", buffering=0) as file:
                for size in (2**20, 2**12, 1):
                    try:
                        while True:
                            file.write(bytes(size))
                    except OSError as error:
                        assert error.errno == errno.ENOSPC, error
        except OSError as error:
            assert error.errno == errno.ENOSPC, error

    def damage(self, how: str) -> None:
        """Damage a file of the newest checkpoint, if another one is left."""
        if len(self.valid()) < 2:
            return
        newest = Checkpoints(str(self.run)).finished()[-1]
        path = self.chance.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        content = bytearray(path.read_bytes())
        place = self.chance.randrange(len(content))
        content[place] ^= 1 << self.chance.randrange(8)
        path.write_bytes(content if how == "flip a bit" else content[:place])
        self.counts["damaged"] += 1

    def check_end(self, start: Start) -> None:
        """The status and the message are right, and nothing is left."""
        output, right = start.output(), DISTURBANCES.get(start.disturbance, (0,))
        if start.status not in right:
            start.problems.append(f"status {start.status}, not {' or '.join(map(str, right))}")
        if start.status == 2 and not re.search("error: .*No space left on device; free some space", output):
            start.problems.append("refused")
        if "Traceback" in output:
            start.problems.append("a traceback")
        try:
            self.wait(lambda: not started_with(f"MARK={MARK}"), 0.1, 30)
        except TimeoutError:
            start.problems.append(f"processes are left: {started_with(f'MARK={MARK}')}")
        try:
            self.wait(self.unlocked, 0.1, 30)  # a process that has just died is not seen, but still has its files
        except TimeoutError:
            start.problems.append("the lock is left")
        shared = [path.name for path in Path("/dev/shm").iterdir()]
        if left := [name for name in shared if self.ids & set(re.findall(r"\d+", name))]:
            start.problems.append(f"shared memory is left: {left}")

    def unlocked(self) -> bool:
        try:
            with (self.run / "lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            pass
        return True

    def check_resumed(self, start: Start) -> None:
        """From the newest checkpoint that is not damaged, with a word about those that are."""
        output, resumed = start.output(), start.resumed()
        if " parameters on " in output and (resumed or 0) != start.newest:
            start.problems.append(f"resumed from step {resumed}, not {start.newest}")
        if resumed is not None and not all(name in output for name in start.suspects):
            start.problems.append(f"said nothing about {', '.join(start.suspects)}")
        if "refused" in start.problems:
            for name in start.suspects:  # which a user would remove now
                shutil.rmtree(self.run / "checkpoints" / name)

    def check_saved(self, start: Start) -> None:
        """No checkpoint is lost."""
        newest = max(self.valid(), default=0)
        if newest < start.newest or start.reached() - newest >= INTERVAL * (1 + start.background):
            self.counts["lost"] += 1
            reached = f"reached step {start.reached()}" if start.reached() >= 0 else "started"
            start.problems.append(f"{reached} from step {start.newest}, but the newest checkpoint is of step {newest}")
        self.counts["steps"] += max(0, start.reached() + 1 - start.newest)

    def check_losses(self, start: Start) -> None:
        """All losses so far, the bit-identical ones before the first switch, are those of the references."""
        try:
            ours = losses(self.run) if (self.run / "metrics.jsonl").exists() else {}
        except (ValueError, KeyError, AssertionError) as error:
            start.problems.append(f"metrics.jsonl: {error}")
            return
        if sorted(ours) != list(range(len(ours))):
            missing = set(range(max(ours))) - ours.keys()
            start.problems.append(f"metrics.jsonl: {len(missing)} steps are missing, from step {min(missing)} on")
        for layout, tolerance in ((FIRST, 0.0), (SINGLE, TOLERANCE)):
            steps = [step for step in ours if layout == SINGLE or step < self.switch_step]
            self.train_reference(layout, max(steps, default=-1) + 1)
            differences = {step: abs(ours[step] - self.references[layout][step]) for step in steps}
            self.differences[layout] = max([self.differences[layout], *differences.values()])
            wrong = {step for step in steps if differences[step] > tolerance and (layout, step) not in self.reported}
            self.reported |= {(layout, step) for step in wrong}
            for step in sorted(wrong)[:1]:
                text = f"from step {step} on, {len(wrong)} losses are not those of {title(layout)}"
                start.problems.append(f"{text}: the first differs by {differences[step]:.1e}")

    def train_reference(self, layout: Layout, steps: int) -> None:
        """Undisturbed, in segments."""
        if len(self.references[layout]) < steps:
            end, folder = -(-steps // SEGMENT) * SEGMENT, self.folder / title(layout)
            settings = {**SETTINGS, "eval_interval": SEGMENT, "resume": "auto", "max_iters": end}
            train(folder, self.data, ranks=layout[1] if layout[1] > 1 else 0, **settings)
            self.references[layout] = losses(folder)

    def report(self, start: Start) -> None:
        left, newest = max(0, self.time_left()), max(self.valid(), default=0)
        what = f"{start.disturbance} {start.moment}".strip() or "nothing"
        print(
            f"[{left / 60:4.1f} min left] start {self.counts['starts']}: {title(start.layout)}, {what}: "
            f"step {start.newest} to {start.reached()}, status {start.status}, saved {newest}"
            f"{''.join(f'; FAILED: {problem}' for problem in start.problems)}",
            flush=True,
        )
        self.failed = self.failed + 1 if start.problems else 0
        if start.problems:
            self.counts["failures"] += 1
            print("".join(f"    | {line[:300]}\n" for line in start.output().splitlines()[-3:]), end="", flush=True)
        else:
            start.log.unlink()

    def table(self) -> str:
        counts = self.counts
        rows = {
            "kills": counts["kill a rank"] + counts["kill the launcher"],
            "stops": counts["stop"],
            "hangs": counts["hang"],
            "damaged checkpoints": counts["damaged"],
            "full disks": counts["full disk"] if self.small_disk else "not possible here",
            **{name: counts[name] for name in ("switches", "starts", "steps")},
            "newest step": max(self.valid(), default=0),
            "largest difference of loss, same strategy": f"{self.differences[FIRST]:.1e}",
            "largest difference of loss, any strategy": f"{self.differences[SINGLE]:.1e}",
            "checkpoints lost": counts["lost"],
            "starts that failed": counts["failures"],
        }
        return "\n".join(f"{name:<44}{value:>10}" for name, value in rows.items())


def title(layout: Layout) -> str:
    return f"{layout[0]}_x{layout[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of what happens when; other processes change it as well")
    parser.add_argument("--out", type=Path, help="an empty folder that is kept; default: one that is removed")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unmounts first
    soak = Soak(folder.resolve(), 3600 * args.hours, args.seed)
    try:
        soak.soak()
        print(soak.table())
    finally:
        soak.close()
    failures = soak.counts["failures"]
    if not args.out and not failures:
        shutil.rmtree(folder)
    elif failures:
        print(f"output and run: {folder}")
    return int(failures > 0)


if __name__ == "__main__":
    assert Path.cwd() == ROOT, f"run it in {ROOT}"
    sys.exit(main())
