"""What the ranks send each other in a step, and how long a ring takes for it.

An all-reduce of S bytes over n ranks sends 2 (n - 1) / n S from each, an all-gather or a reduce-scatter half of that
(Patarasu & Yuan, 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"). A ring over nodes goes
in and out of each once, so its slowest link decides. Of P parameters DDP all-reduces the gradients, and ZeRO's paper
(arXiv:1910.02054, section 7) has the same volume for stages 1 and 2, half as much again for stage 3. DeepSpeed differs:
its stages 1 and 2 all-reduce their buckets instead of scattering them, and stages 2 and 3 do so in every micro-step.
"""

import math
from dataclasses import dataclass

from training.plan.activations import FP32
from training.plan.case import Case

DDP_BUCKET = 25 * 2**20  # bytes: DistributedDataParallel's default
COPIES = 4  # of a gradient on its way through DeepSpeed's buckets: in, flat, averaged, out


@dataclass(frozen=True)
class Transfer:
    """A collective of payload bytes, `times` a step."""

    what: str  # all-reduce, all-gather, reduce-scatter
    payload: float
    ranks: int
    times: int
    messages: float  # that one of them is cut into
    beside: str = ""  # what runs meanwhile: "backward" or all of the micro-step's "computing"; "": nothing
    copied: float = 0.0  # bytes that the device copies for it besides
    crossing: bool = False  # from node to node only

    def sent(self) -> float:
        """Bytes of a rank."""
        return (2 if self.what == "all-reduce" else 1) * (self.ranks - 1) / self.ranks * self.payload

    def seconds(self, case: Case) -> float:
        """Of one."""
        system = case.system
        copying = 2 * self.copied / system.memory_rate
        if self.ranks == 1:
            return copying
        waiting = self.messages * system.latency * math.log2(self.ranks)  # by trees, as NCCL where messages are short
        return self.sent() / system.link_of(system.ranks if self.crossing else self.ranks) + waiting + copying


def transfers(case: Case, micro_steps: int) -> list[Transfer]:
    strategy, ranks, on_gpu = case.strategy, case.system.ranks, case.system.on_gpu
    if strategy.name == "single":
        return []
    gradients, weights = FP32 * case.count, case.precision.computed * case.count
    if strategy.name == "ddp":
        return [Transfer("all-reduce", gradients, ranks, 1, gradients / DDP_BUCKET, "backward")]
    if strategy.name == "zero0":
        return [Transfer("all-reduce", gradients, ranks, 1, math.ceil(case.count / 5e8), "", gradients)]
    if strategy.fsdp:
        return of_fsdp(case, micro_steps)
    messages = math.ceil(case.count / case.sizes.reduce_bucket)
    beside = "backward" if on_gpu and case.sizes.overlap else ""
    times = 1 if strategy.stage == 1 else micro_steps
    if strategy.stage < 3:
        arriving = math.ceil(case.count / case.sizes.allgather_bucket)
        return [
            Transfer("all-reduce", weights, ranks, times, messages, beside, COPIES * weights),
            Transfer("all-gather", weights, ranks, 1, arriving),
        ]
    beside = "computing" if case.sizes.overlap or not on_gpu else ""
    matrices = 4 * case.shape.n_layer  # gathered one by one, for forward and for backward
    gather = Transfer("all-gather", weights, ranks, times, matrices, beside, weights)
    return [
        gather,
        gather,
        Transfer("reduce-scatter", weights, ranks, times, messages, beside, COPIES * weights),
    ]


def of_fsdp(case: Case, micro_steps: int) -> list[Transfer]:
    """Weights in the compute dtype for forward and, but for what is kept, for backward; gradients in fp32.

    Over gloo FSDP2's reduce-scatter sends as much as an all-reduce, DeepSpeed's does not: seen on a loopback device.
    """
    scatter = "all-reduce" if case.gloo else "reduce-scatter"
    beside, blocks = ("computing" if case.system.on_gpu else ""), case.shape.n_layer + 1
    weights, gradients = case.precision.computed * case.count, FP32 * case.count
    again = 1 - case.kept() / case.count
    found = [
        Transfer("all-gather", weights, case.shard, micro_steps, blocks, beside, weights),
        Transfer(scatter, gradients, case.shard, micro_steps, blocks, beside, gradients),
    ]
    if again:
        found.append(Transfer("all-gather", again * weights, case.shard, micro_steps, blocks, beside, again * weights))
    if copies := case.system.ranks // case.shard - 1:
        apart = gradients / case.shard * case.system.gpus  # of all of a node's ranks, through its link
        found.append(Transfer("all-reduce", apart, copies + 1, micro_steps, blocks, beside, crossing=True))
    return found
