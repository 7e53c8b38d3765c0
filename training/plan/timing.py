"""How long a step takes: computing, communication that nothing hides, the update."""

from dataclasses import dataclass

from training.plan.case import Case
from training.plan.traffic import transfers

BACKWARD = 2 / 3  # of the work without recomputation: twice forward's
RECOMPUTED = 4 / 3  # with it (arXiv:2205.05198, section 5: forward once more)
UPDATED = 28  # bytes a parameter: AdamW reads weight, gradient and moments, and writes all but the gradient, in fp32
CLIPPED = 12  # the norm reads a gradient, scaling reads and writes it
SWAPPED = 12  # bytes a parameter that NVMe gives and takes: fp32 weight and moments
AHEAD = 1.0  # share of a micro-step on CPU ranks that ZeRO-3 fetches ahead in (assumptions.py: overlap)


@dataclass(frozen=True)
class Timing:
    """Seconds of a step; communication: what computing does not hide."""

    computing: float
    communication: float
    update: float
    sent: float  # bytes of a rank

    def step(self) -> float:
        return self.computing + self.communication + self.update


def timing(case: Case, batch: int, checkpointing: bool, micro_steps: int) -> Timing:
    """batch: sequences of a rank and micro-step."""
    system, shape = case.system, case.shape
    flops = batch * shape.block_size * shape.flops_per_token() * (RECOMPUTED if checkpointing else 1)
    computing = flops / (system.flops * system.achievable)
    overhead = system.of("overheads", case.strategy.name) * (shape.n_layer + 1)
    backward = computing * (1 - (1 - BACKWARD) / (RECOMPUTED if checkpointing else 1))
    found = transfers(case, micro_steps)
    exposed = sum(t.times * t.seconds(case) for t in found if not t.beside)
    ahead = (system.overlap if system.on_gpu else AHEAD) * (computing + overhead)
    for window, beside in ((system.overlap * backward, "backward"), (ahead, "computing")):
        together = [t for t in found if t.beside == beside]
        if together:
            once = sum(t.seconds(case) for t in together)
            exposed += together[0].times * max(0.0, once - window)
    exposed += offloaded(case, micro_steps)
    sent = sum(t.times * t.sent() for t in found)
    return Timing(micro_steps * (computing + overhead), exposed, update(case), sent)


def offloaded(case: Case, micro_steps: int) -> float:
    """Seconds that weights and gradients take between the device and the host or its disk."""
    strategy, system = case.strategy, case.system
    if not strategy.offloads or not system.on_gpu:
        return 0.0
    mine = case.precision.computed * case.count / case.shard
    gathers = 1 + (1 - case.kept() / case.count) if strategy.stage == 3 else 0
    slowest = system.nvme_bandwidth / system.gpus if strategy.weights == "nvme" else system.host_link
    return micro_steps * mine * (1 / system.host_link + gathers / slowest) + mine / system.host_link


def update(case: Case) -> float:
    """Seconds of clipping and AdamW, over the memory that its states are in."""
    strategy, system = case.strategy, case.system
    mine = case.count / (case.shard if strategy.stage else 1)
    if strategy.offloads and system.on_gpu:
        seconds = mine * (UPDATED + CLIPPED) * system.gpus / system.host_bandwidth
    else:
        seconds = mine * (UPDATED / (system.update_rate or system.memory_rate) + CLIPPED / system.memory_rate)
    if strategy.optimizer == "nvme":
        seconds += 2 * SWAPPED * mine * system.gpus / system.nvme_bandwidth
    return seconds
