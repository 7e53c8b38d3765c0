"""The launches of a benchmark: every strategy in turn, round by round, and then each once more with a probe inside."""

import json
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training import speed
from training.benchmark import launches, peer
from training.benchmark.launches import Failure
from training.benchmark.strategies import PEER, Strategy
from training.train_config import TrainConfig

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What all launches have in common."""

    cfg: TrainConfig
    arguments: list[str]  # of the train scripts
    launcher: list[str]  # launch.py with its ranks, or launch_hosts.py
    steps: int
    rounds: int
    probe: str  # "" (all), "--memory", or "none"
    on_gpu: bool
    peer: Path | None


@dataclass
class Case:
    """A row to be: a strategy, or the peer, and what its launches brought."""

    name: str
    ranks: int
    strategy: Strategy | None  # None: the peer
    runs: list[Rows] = field(default_factory=list)  # of each round: the rows of its training steps
    starts: list[float] = field(default_factory=list)  # seconds to the end of the first step
    notes: list[dict[str, Any]] = field(default_factory=list)  # the probe's, of each rank
    environment: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None


def cases(strategies: list[Strategy], plan: Plan) -> list[Case]:
    found = [Case(strategy.name, strategy.ranks, strategy) for strategy in strategies]
    ranks = max(case.ranks for case in found) if plan.on_gpu else 1  # nanoGPT's DDP needs GPUs
    return [*found, *([Case(PEER, ranks, None)] if plan.peer else [])]


def take(found: list[Case], plan: Plan, folder: Path) -> None:
    """All launches. A case that fails takes no more part; the others go on. Ctrl-C keeps what there is."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        launch(found, plan, folder)
    except KeyboardInterrupt:
        for case in found:
            done = len(case.runs) == plan.rounds and (case.notes or plan.probe == "none" or not case.strategy)
            if not case.failure and not done:
                case.failure = Failure("stopped", "before all of its launches were done")


def launch(found: list[Case], plan: Plan, folder: Path) -> None:
    timed = [(case, f"round {number + 1} of {plan.rounds}") for number in range(plan.rounds) for case in found]
    probed = [(case, "memory and breakdown") for case in found if case.strategy and plan.probe != "none"]
    clock = Clock(len(timed) + len(probed))
    for number, (case, what) in enumerate(timed + probed):
        if case.failure:
            clock.skip()
            continue
        clock.announce(f"{what}: {case.name}")
        action = probe if number >= len(timed) else once if case.strategy else once_peer
        case.failure = action(case, plan, folder / f"{case.name}-{number}")
        if case.failure:
            print(f"  {case.failure.status}: {case.failure.error}", flush=True)
        clock.done()


class Clock:
    """A line before each launch, with what is left by the mean of those that are done."""

    def __init__(self, launches: int):
        self.launches, self.number, self.seconds, self.ran = launches, 0, 0.0, 0

    def announce(self, text: str) -> None:
        self.number += 1
        left = (self.launches - self.number + 1) * self.seconds / max(self.ran, 1) / 60
        about = f" (about {left:,.0f} min left)" if left >= 1 else " (less than a minute left)" if self.ran else ""
        print(f"[{self.number}/{self.launches}] {text}{about}", flush=True)
        self.since = time.perf_counter()

    def done(self) -> None:
        self.seconds, self.ran = self.seconds + time.perf_counter() - self.since, self.ran + 1

    def skip(self) -> None:
        self.number += 1


def line(case: Case, plan: Plan, inside: list[str], *more: str) -> list[str]:
    """The command of a launch; inside: what stands before the script."""
    assert case.strategy, "the peer has a command of its own"
    launcher = ["launch.py", "1"] if case.ranks == 1 else plan.launcher
    own = [argument for argument in plan.arguments if case.strategy.takes(argument)]
    return [sys.executable, *launcher, *inside, case.strategy.script[0], *own, *case.strategy.script[1:], *more]


def once(case: Case, plan: Plan, out_dir: Path) -> Failure | None:
    """One timed run."""
    more = ["--benchmark", f"--steps={plan.steps}", f"--out_dir={out_dir}"]
    ended = launches.run(line(case, plan, [], *more), "step 0: loss")
    if failure := launches.failure(ended):
        return failure
    case.runs.append(speed.train_rows(out_dir / "metrics.jsonl"))
    case.starts.append(ended.first_step_s or ended.seconds)
    case.environment = json.loads((out_dir / "environment.json").read_text())
    del case.environment["command"]  # the benchmark's own arguments are noted, without this launch's folder
    return None


def once_peer(case: Case, plan: Plan, folder: Path) -> Failure | None:
    assert plan.peer, "a peer without a path"
    peer.prepare(folder, plan.peer, plan.cfg)
    command = peer.command(plan.peer, plan.cfg, case.ranks, plan.steps, plan.on_gpu)
    ended = launches.run(command, "iter 0: loss", folder)
    cfg = plan.cfg
    found = peer.rows(ended.said, cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size)
    if failure := launches.failure(ended):
        return failure
    if len(found) < plan.steps:
        return Failure(launches.FAILED, f"it printed {len(found)} steps of {plan.steps}: its lines are not nanoGPT's")
    case.runs.append(found)
    case.starts.append(ended.first_step_s or ended.seconds)
    return None


def probe(case: Case, plan: Plan, folder: Path) -> Failure | None:
    """One run with a probe in every rank."""
    notes = folder / "notes"
    inside = ["benchmark.py", "--inside", *([plan.probe] if plan.probe else []), str(notes)]
    ended = launches.run(line(case, plan, inside, f"--out_dir={folder}"), "step 0: loss")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the next one may need the room
    if failure := launches.failure(ended):
        return failure
    case.notes = [json.loads((notes / f"rank_{rank}.json").read_text()) for rank in range(case.ranks)]
    return None
