"""The memory of a rank at its fullest: model state, what is gathered, activations, buffers, fragments."""

from dataclasses import dataclass

from training.plan import activations
from training.plan.activations import FP32
from training.plan.case import Case

ZERO0_BUCKET = 5e8  # elements: DeepSpeed's engine, which has no setting for it


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank's device; host and nvme are a node's, of all its ranks."""

    weights: float
    gradients: float
    optimizer_states: float
    gathered: float  # whole weights, for a moment; by autocast, their copies in half precision
    activations: float
    buffers: float
    fragmentation: float
    baseline: float
    host: float
    nvme: float

    def model_state(self) -> float:
        return self.weights + self.gradients + self.optimizer_states

    def total(self) -> float:
        held = self.model_state() + self.gathered + self.activations + self.buffers
        return held + self.fragmentation + self.baseline


def footprint(case: Case, batch: int, checkpointing: bool, micro_steps: int = 1) -> Footprint:
    """batch: sequences of a rank and micro-step."""
    places = where(case)
    held = list(zip(vars(case.state()).values(), places, strict=True))
    on = [sum(size for size, place in held if place == wanted) for wanted in ("host", "nvme")]
    gathered = case.gathered() * case.precision.computed
    active = activations.peak(case.shape, batch, case.precision, checkpointing)
    passing = max(in_backward(case, active), in_update(case) - active - gathered)
    weights, gradients, states = (size if place == "device" else 0.0 for size, place in held)
    fragments = case.system.fragmentation * (gathered + active + passing)
    return Footprint(
        weights,
        gradients,
        states,
        gathered,
        active,
        passing + apart(case, micro_steps),
        fragments,
        case.system.of("baselines", case.strategy.name),
        host=case.system.gpus * (on[0] + staging(case)),
        nvme=case.system.gpus * on[1],
    )


def where(case: Case) -> list[str]:
    """The places of weights, gradients (where they are summed) and optimizer states."""
    strategy = case.strategy
    found = [strategy.weights, "host" if strategy.offloads else "device", strategy.optimizer]
    return [place if case.system.on_gpu or place == "nvme" else "device" for place in found]  # CPU ranks: one memory


def apart(case: Case, micro_steps: int) -> float:
    """Bytes of DDP's buckets, while gradients of several micro-steps add up outside of them.

    Of the last one the gradients come into the buckets, which they otherwise are (gradient_as_bucket_view).
    """
    return FP32 * case.count if case.strategy.name == "ddp" and micro_steps > 1 else 0


def in_backward(case: Case, active: float) -> float:
    """Bytes of gradients on their way, beside activations."""
    computed, strategy = case.precision.computed, case.strategy
    if strategy.fsdp:  # a block's gradients, and as fp32 in the buffer that is reduced
        return case.shape.block() * (computed + FP32)
    if not strategy.stage:
        return 0
    bucket, gone = case.sizes.reduce_bucket * (1 + case.sizes.overlap), 0.0
    if not case.system.on_gpu:  # a page is taken when it is written to: while the bucket fills, activations go
        bucket = min(bucket, case.count)
        gone = active * bucket / case.count
    if strategy.stage == 3:
        return max(0, computed * (bucket + case.shape.block()) - gone)
    full = strategy.stage == 2 or case.sizes.overlap
    return max(0, computed * (bucket + reduced(case)) - gone) if full else 0


def reduced(case: Case) -> float:
    """Elements of the copy of a bucket, or of the largest matrix, that DeepSpeed makes to reduce it."""
    return min(case.count, max(case.sizes.reduce_bucket, case.shape.head()))


def in_update(case: Case) -> float:
    """Bytes beside the model state when backward is done: gradients as the optimizer wants them, gathers."""
    computed, strategy = case.precision.computed, case.strategy
    if strategy.fsdp:  # what reads out is reduced last
        return case.shape.head() * 2 * (computed + FP32)
    if not strategy.deepspeed:
        return 0
    if strategy.stage == 0:
        return FP32 * min(case.count, ZERO0_BUCKET)
    mine = 0 if strategy.offloads else FP32 * min(case.count / case.shard, case.sizes.sub_group)
    if strategy.stage == 3:
        return mine + 4 * computed * case.shape.head()  # what reads out, last: whole, its gradient, flat, and padded
    arriving = min(case.count, case.sizes.allgather_bucket) if case.gloo else 0  # NCCL gathers in place
    reducing = reduced(case) if strategy.stage == 1 and not case.sizes.overlap else 0  # their bucket takes their place
    return max(mine, computed * arriving, computed * reducing)


def staging(case: Case) -> float:
    """Bytes of host memory that a rank reads from and writes to its disk through."""
    if case.strategy.optimizer != "nvme":
        return 0
    mine = case.count / case.shard
    weights = min(mine, case.sizes.in_host) + case.sizes.parameter_buffers
    return case.precision.computed * weights + FP32 * case.sizes.optimizer_buffers * min(mine, case.sizes.sub_group)
