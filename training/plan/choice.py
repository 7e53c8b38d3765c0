"""Every strategy with every micro-batch, the best of each, and the one to take."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from training.errors import UserError
from training.plan.case import Case
from training.plan.footprint import Footprint, footprint
from training.plan.shapes import Shape
from training.plan.strategies import STRATEGIES, Strategy
from training.plan.system import System
from training.plan.timing import Timing, timing
from training.units import gigabytes

DAY, HOUR = 86400.0, 3600.0
ROOM = 0.05  # of a device, which is to stay free where there is a choice: predictions are off by as much
ALIKE = 0.02  # of a step's time: less is no reason for the more complicated strategy, or the smaller micro-batch


@dataclass(frozen=True)
class Wish:
    """What a step is to be; tokens: of the whole run."""

    shape: Shape
    system: System
    strategies: tuple[Strategy, ...]
    global_batch: int  # sequences
    tokens: float
    batch_size: int = 0  # of a rank and micro-step; 0: whichever is best
    checkpointing: tuple[bool, ...] = (False, True)
    shard_ranks: int = 0

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.shape.block_size

    def batches(self) -> list[int]:
        """Micro-batches that divide the global batch; UserError where none does."""
        each, left = divmod(self.global_batch, self.system.ranks)
        if left or not each:
            fits = [n for n in (self.global_batch - left, self.global_batch - left + self.system.ranks) if n]
            raise UserError(
                f"global-batch = {self.global_batch}: must be divisible by the {self.system.ranks} ranks, under every "
                f"strategy; take {' or '.join(map(str, fits))}"
            )
        if self.batch_size and each % self.batch_size:
            raise UserError(
                f"batch_size = {self.batch_size}: must divide the {each} sequences that each of {self.system.ranks} "
                f"ranks has of a global batch of {self.global_batch}; take one of {listed(divisors(each))}"
            )
        return [self.batch_size] if self.batch_size else divisors(each)


@dataclass(frozen=True)
class Option:
    """A strategy with a micro-batch: what it needs, and how fast it is."""

    wish: Wish
    case: Case
    batch: int
    checkpointing: bool
    memory: Footprint
    time: Timing

    @property
    def micro_steps(self) -> int:
        return self.wish.global_batch // (self.batch * self.wish.system.ranks)

    @property
    def accumulation(self) -> int:
        """nanoGPT's gradient_accumulation_steps: the micro-steps of all ranks."""
        return self.wish.global_batch // self.batch

    def spare(self) -> float:
        """Bytes: negative where it does not fit, of the device or of the host."""
        system = self.wish.system
        spare = system.memory - self.memory.total()
        if system.host_memory:
            spare = min(spare, (system.host_memory - self.memory.host) / system.gpus)
        return spare

    def fits(self) -> bool:
        return self.spare() >= 0

    def roomy(self) -> bool:
        return self.spare() >= ROOM * self.wish.system.memory

    def tokens_per_second(self) -> float:
        return self.wish.tokens_per_step / self.time.step()

    def mfu(self) -> float:
        """Without recomputation, over the peak; of CPU ranks over the measured ceiling."""
        system = self.wish.system
        return self.tokens_per_second() * self.wish.shape.flops_per_token() / (system.ranks * system.flops)

    def days(self) -> float:
        return self.wish.tokens / self.tokens_per_second() / DAY

    def gpu_hours(self) -> float:
        return self.days() * DAY / HOUR * self.wish.system.ranks


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def possible(strategy: Strategy, system: System, shard_ranks: int) -> bool:
    """One process is no DDP, and a hybrid needs several groups of several ranks."""
    if strategy.hybrid:
        return 1 < (shard_ranks or system.gpus) < system.ranks
    return strategy.name != ("ddp" if system.ranks == 1 else "single")


def options(wish: Wish) -> Iterator[Option]:
    """Of every strategy, micro-batch, with and without activation checkpointing; those that do not fit, too."""
    batches = wish.batches()
    for strategy in wish.strategies:
        case = Case(wish.shape, strategy, wish.system, wish.shard_ranks)
        for batch in batches:
            for checkpointing in wish.checkpointing:
                micro_steps = wish.global_batch // (batch * wish.system.ranks)
                memory = footprint(case, batch, checkpointing, micro_steps)
                time = timing(case, batch, checkpointing, micro_steps)
                yield Option(wish, case, batch, checkpointing, memory, time)


def takable(found: list[Option]) -> list[Option]:
    """Those that fit; only those with room to spare, where there are such."""
    return [option for option in found if option.roomy()] or [option for option in found if option.fits()]


def best(found: list[Option]) -> Option:
    """Of one strategy: among those about as fast, the largest micro-batch; where none fits, the smallest in memory."""
    fitting = takable(found)
    if not fitting:
        return max(found, key=lambda option: option.spare())
    fastest = min(option.time.step() for option in fitting)
    return max((o for o in fitting if o.time.step() <= fastest * (1 + ALIKE)), key=lambda option: option.batch)


def by_strategy(found: list[Option]) -> dict[str, list[Option]]:
    names: dict[str, list[Option]] = {}
    for option in found:
        names.setdefault(option.case.strategy.name, []).append(option)
    return names


def best_of_each(found: list[Option]) -> list[Option]:
    return [best(of_one) for of_one in by_strategy(found).values()]


def recommended(bests: list[Option]) -> Option | None:
    """The simplest of those about as fast as the fastest that fits; None where none fits."""
    fitting = takable(bests)
    if not fitting:
        return None
    fastest = min(option.time.step() for option in fitting)
    order = list(STRATEGIES)
    alike = [option for option in fitting if option.time.step() <= fastest * (1 + ALIKE)]
    return min(alike, key=lambda option: order.index(option.case.strategy.name))


def reason(taken: Option, bests: list[Option]) -> str:
    """Why it is taken, in a sentence."""
    others = [option for option in bests if option is not taken]
    fitting = sorted((option for option in others if option.fits()), key=lambda option: option.time.step())
    lacking = [f"{o.case.strategy.name} by {gigabytes(-o.spare())}" for o in others if not o.fits()]
    if not fitting:
        words = "the only one that fits"
    else:
        more = fitting[0].time.step() / taken.time.step() - 1
        name = fitting[0].case.strategy.name
        words = f"the fastest that fits; {name} comes next, {more:.0%} slower"
        if more < 0:
            words = f"about as fast as {name}, the fastest, and simpler"
        elif more <= ALIKE:
            words = f"the fastest that fits; {name} comes next, about as fast"
    words += f"; {gigabytes(taken.spare())} of {gigabytes(taken.wish.system.memory)} stay free"
    if taken.checkpointing:
        words += "; without activation checkpointing it does not fit, or only in micro-batches that are slower"
    return words + (f"; too large are {', '.join(lacking)}" if lacking else "")
