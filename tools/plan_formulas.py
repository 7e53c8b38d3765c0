"""Memory of a rank, what it sends, how long a step takes, by formulas with their sources; the best candidates.

P: parameters; b: sequences per rank and micro-step; s: tokens per sequence; h: width; V: vocabulary; c: bytes per
number in matmuls (2 or 4); n: ranks that take part. Sizes are bytes of one rank.
"""

import math
from dataclasses import dataclass, field
from itertools import groupby

import torch

from model import GPTConfig
from training.config import Settings, key
from training.deepspeed_parallel import splits_vocabulary
from training.distributed import Layout
from training.gpus import DEVICES
from training.strategies import ModelState, Strategy, model_state_bytes

FP32, TOKEN_BYTES = 4, 16  # bytes of a number; of a token and its target, int64 each
LOSS_ROWS, LOSS_ELEMENTS = 2048, 2**21  # logits in fp32 at a time: rows on a GPU, elements on a CPU (model.py)
FORWARD, RECOMPUTED = 1 / 3, 4 / 3  # of a micro-step's work: forward; everything, with activation checkpointing
ZERO0_BUCKET = 5e8  # elements, fixed in DeepSpeed's engine
UPDATE_BYTES = 28 + 12  # per parameter: AdamW reads 16 and writes 12, clipping reads 8 and writes 4
SWAP_BYTES = 12  # per parameter: fp32 parameter and two moments, read from NVMe and written back
# Bytes per second, assumed: memory and NVMe of a node's host, shared by its ranks; PCIe 4 x16 less a fifth, of a GPU.
HOST_BANDWIDTH, NVME_BANDWIDTH, HOST_LINK = 100e9, 3e9, 25e9
ROOM = 0.05  # of the device, left free where there is a choice: predictions are not better than that
ALIKE = 0.02  # of a step's time: less is no reason for the more complicated strategy, or the smaller micro-batch


@dataclass(frozen=True)
class Machines(Settings):
    """The machines, in the units of the planner's options. Before a plan, 0 is replaced by the data sheet's number."""

    gpus: int = key(8, "GPUs, or CPU ranks, per node; also --ranks", "Machines")
    nodes: int = key(1, "number of nodes")
    device: str = key("A100", ", ".join(DEVICES))
    gpu_memory: float = key(0.0, "GB, instead of the device's; of a CPU rank, its part of the host's")
    memory_bandwidth: float = key(0.0, "GB/s of that memory, instead of the device's")
    tflops: float = key(0.0, "peak of dense matmuls in dtype, instead of the device's")
    link: float = key(400.0, "Gbit/s of a node to the others, all of its ports together")
    node_link: float = key(0.0, "Gbit/s between the ranks of a node, instead of the device's")
    dtype: str = key("", "bfloat16, float16, float32; empty: the recipe's, else the measured, else bfloat16")
    achievable: float = key(0.5, "share of the peak that computing reaches; nanoGPT's GPT-2 0.3 (A100)", "Assumptions")
    link_share: float = key(0.8, "share of a link's rate that collectives reach; 1 on CPU ranks")
    overlap: float = key(0.8, "share of computing that hides communication; 0.5 on CPU ranks (results/zero_links)")
    fragmentation: float = key(0.1, "share of activations and buffers that the allocator loses; 0 on CPU ranks")
    baseline: float = key(1.5, "GB of a process besides tensors: CUDA, NCCL")

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def bandwidth(self, span: int, streams: int = 1) -> float:
        """Bytes/s of a rank in a group that spans so many consecutive ranks, if as many streams leave its node."""
        rate = self.node_link if span <= self.gpus else min(self.node_link, self.link) / streams
        return self.link_share * rate * 1e9 / 8  # from Gbit/s


@dataclass
class Part:
    """What one rank has of a model, and computes for a token; in a pipeline, on the first and on the last stage.

    Tensor parallelism divides the matrices of blocks and, without a pipeline, the logits (Shoeybi et al., arXiv:
    1909.08053, section 3), expert parallelism the experts, and ZeRO the rest over all ranks that have the same.
    FLOPs: 6 P + 12 L h s, where P leaves out idle experts (PaLM, arXiv:2204.02311, appendix B).
    """

    model: GPTConfig
    layout: Layout
    ranks: int
    shard_ranks: int = 0  # that share one copy of the model state; 0: all that have the same part

    def __post_init__(self) -> None:
        model, layout = self.model, self.layout
        head = model.vocab_size * model.n_embd  # the largest matrix, which embeds tokens and projects to logits
        positions = 0 if model.rope_theta else model.block_size * model.n_embd
        blocks = model.parameter_count() - head * (1 if model.tied else 2) - positions
        self.layers = math.ceil(model.n_layer / layout.pipeline)  # of a stage
        expert = self.layers * 3 * model.n_hidden * model.n_embd  # one in each block
        shared = (self.layers / model.n_layer * blocks - model.n_expert * expert) / layout.tensor
        experts = model.n_expert * expert / layout.expert
        self.block = (shared + experts) / self.layers
        self.vocabulary = model.vocab_size // (layout.tensor if splits_vocabulary(model, layout) else 1)
        self.head = self.vocabulary * model.n_embd
        embedding = 0 if model.tied or layout.pipeline > 1 else head
        self.parameters = shared + experts + positions + embedding + self.head
        self.shards = self.shard_ranks or self.ranks // (layout.tensor * layout.pipeline)
        copies = self.ranks // (layout.pipeline * layout.expert) if layout.expert > 1 else self.shards  # of an expert
        self.partition = (self.parameters - experts) / self.shards + experts / copies
        # ranks that share a token's MLP: AutoTP divides no experts, AutoEP the tokens that go to them
        self.mlp_ranks = layout.tensor if layout.expert > 1 or not model.n_expert else 1
        active = min(model.n_expert, model.n_active) * expert / self.mlp_ranks
        attended = model.n_head * model.head_size / layout.tensor  # numbers per token and block
        self.flops = 6 * (shared + active + self.head) + 12 * self.layers * attended * model.block_size
        # numbers that a block saves of a token: queries, keys, values, the input of c_proj; the same of the MLP
        self.heads = 2 * (model.n_head + model.n_kv_head) * model.head_size / layout.tensor
        self.hidden = (4 if model.mlp == "swiglu" else 2) * model.n_hidden / self.mlp_ranks
        if model.n_expert:  # also their input, and their output twice
            self.hidden = model.n_active * (self.hidden + 3 * model.n_embd / self.mlp_ranks)

    def state(self, strategy: str, dtype: torch.dtype) -> ModelState:
        return model_state_bytes(strategy, self.parameters / self.partition, self.parameters, dtype)


@dataclass
class Candidate:
    """A model under a strategy and a layout, with a micro-batch, on a system, and what is predicted for it."""

    model: GPTConfig
    strategy: Strategy
    system: Machines
    batch: int  # sequences per micro-step, of a rank with batches of its own
    micro_steps: int
    checkpointing: bool
    layout: Layout = field(default=Layout())

    def __post_init__(self) -> None:
        model, strategy, system, layout = self.model, self.strategy, self.system, self.layout
        self.sizes = " ".join(f"{name[0]}p{size}" for name, size in vars(layout).items() if size > 1)  # "tp8 pp4"
        self.name = f"{strategy.name} {self.sizes}".strip()
        self.deepspeed = strategy.script == "train_deepspeed.py"
        self.offloads = strategy.optimizer_device != "gpu" and system.on_gpu  # CPU ranks have only one memory
        # what offloads, shares and partitions less is simpler
        place = ("gpu", "cpu", "nvme").index(strategy.optimizer_device)
        self.complexity = place, math.prod(vars(layout).values()), strategy.stage, self.deepspeed
        self.part = Part(model, layout, system.ranks, system.gpus if strategy.hybrid else 0)
        self.tokens = self.batch * model.block_size // layout.sequence  # of any rank, per micro-step
        self.compute_bytes = FP32 if system.dtype == "float32" else 2
        # parameters, norms and the residual stream stay in fp32 while matmuls are in half precision
        self.autocast = strategy.stage == 0 and self.compute_bytes < FP32
        self.residual_bytes = FP32 if self.autocast else self.compute_bytes
        # "auto" as in the Hugging Face Trainer
        self.zero = {name: model.n_embd**2 if value == "auto" else value for name, value in strategy.zero.items()}
        # whether stages 1 to 3 communicate beside computing; FSDP2 always does, a pipeline never
        overlaps = not self.deepspeed or self.zero.get("overlap_comm", strategy.stage == 3)  # DeepSpeed's default
        self.overlap_comm = system.on_gpu and bool(overlaps) and layout.pipeline == 1
        # how often a micro-step gathers the parameters; FSDP2's root unit keeps the head until backward
        kept = 1.0 if strategy.keeps_parameters else 0.0 if self.deepspeed else self.part.head / self.part.parameters
        self.gathers = 2 - kept if strategy.stage == 3 else 0.0
        self.predict_memory()
        self.predict_time()

    def predict_memory(self) -> None:
        """Bytes of a rank at peak; host and nvme per node. DDP's buckets are beside gradients of micro-steps."""
        strategy, system = self.strategy, self.system
        name = f"zero{strategy.stage}" if self.deepspeed else strategy.name  # whatever the JSON is called
        state = self.part.state(name, getattr(torch, system.dtype))
        sizes = by_device(state, strategy.optimizer_device, strategy.parameter_device)
        on_host = sizes["cpu"] if system.on_gpu else 0.0
        self.model_state = sizes["gpu"] + sizes["cpu"] - on_host
        self.host, self.nvme = system.gpus * on_host, system.gpus * sizes["nvme"]
        self.activations = peak_activations(self)
        self.buffers = gathered_parameters(self) + gradient_buffers(self)
        self.other = 1e9 * system.baseline + system.fragmentation * (self.activations + self.buffers)
        self.buffers += FP32 * self.part.parameters if strategy.name == "ddp" and self.micro_steps > 1 else 0
        self.memory = self.model_state + self.activations + self.buffers + self.other
        self.spare = 1e9 * system.gpu_memory - self.memory  # negative if it does not fit

    def predict_time(self) -> None:
        """m micro-steps, and a pipeline's bubble, (p - 1) / m of their time (arXiv:2104.04473, section 2.2.1).

        Communication counts where it is longer than the `overlap` share of the computing beside it. The update moves 40
        bytes a parameter of the shard; offload moves weights and gradients over PCIe in each micro-step.
        """
        system, strategy, work = self.system, self.strategy, RECOMPUTED if self.checkpointing else 1.0
        once = self.tokens * self.part.flops / (1e12 * system.tflops * system.achievable)
        self.computing = (self.micro_steps + self.layout.pipeline - 1) * work * once
        found = transfers(self, FORWARD * once, (work - FORWARD) * once) + layout_transfers(self)
        self.sent = sum(sent for sent, _, _ in found)
        self.communication = sum(max(0.0, seconds - system.overlap * beside) for _, seconds, beside in found)
        shard = self.part.partition if strategy.stage else self.part.parameters
        bandwidth = HOST_BANDWIDTH / system.gpus if self.offloads else 1e9 * system.memory_bandwidth
        self.update = shard * UPDATE_BYTES / bandwidth
        if self.offloads:
            slowest = NVME_BANDWIDTH / system.gpus if strategy.parameter_device == "nvme" else HOST_LINK
            seconds = self.micro_steps * (1 / HOST_LINK + self.gathers / slowest) + 1 / HOST_LINK
            self.communication += seconds * self.compute_bytes * self.part.partition
        if strategy.optimizer_device == "nvme":
            self.update += 2 * SWAP_BYTES * shard * system.gpus / NVME_BANDWIDTH
        self.seconds = self.computing + self.communication + self.update
        tokens = self.batch * self.micro_steps * self.layout.data(system.ranks) * self.model.block_size
        self.tokens_per_second = tokens / self.seconds
        # model FLOP/s, without recomputation, over the matmul peak or the measured ceiling
        self.mfu = self.tokens_per_second * self.model.flops_per_token() / (system.ranks * 1e12 * system.tflops)


def by_device(state: ModelState, optimizer_device: str, parameter_device: str) -> dict[str, float]:
    """Bytes of a rank's model state on gpu, cpu and nvme; gradients are never on NVMe."""
    sizes = dict.fromkeys(("gpu", "cpu", "nvme"), 0.0)
    sizes[parameter_device] += state.parameters
    sizes["gpu" if optimizer_device == "gpu" else "cpu"] += state.gradients
    sizes[optimizer_device] += state.optimizer_states
    return sizes


def block_activations(case: Candidate) -> float:
    """A block saves 16 c s b h bytes for backward, 36 s b h under autocast, whose residual stream is fp32.

    Korthikanti et al. (arXiv:2205.05198, section 4.1) count s b h (34 + 5 a s / h) in half precision for a heads. The
    5 a s² b are the attention matrix, which FlashAttention (arXiv:2205.14135) never stores; 2 s b h are dropout masks.
    Of t tensor-parallel ranks, each has what enters norms and matrices, and a part of the rest: 10 + 24 / t (4.2.1).
    """
    model, part = case.model, case.part
    numbers = 2 * model.n_embd + part.heads + part.hidden  # with the inputs of c_attn and c_fc
    if case.layout.sequence > 1:  # attention's output before the exchange, too
        numbers += model.n_head * model.head_size / case.layout.tensor
    saved = case.compute_bytes * numbers + 2 * case.residual_bytes * model.n_embd  # and the inputs of two norms
    masks = 2 * model.n_embd if model.dropout else 0  # one byte per element
    statistics = FP32 * (4 + model.n_head / case.layout.tensor)  # mean, deviation of two norms; logsumexp of each head
    return case.tokens * (saved + masks + statistics)


def saved_activations(case: Candidate) -> tuple[float, float]:
    """Bytes that the blocks, and that the head, have saved for backward when forward ends.

    With activation checkpointing a block saves its input only (section 5 of that paper). The head saves the last norm
    and c s b V of logits, whose gradient takes their place (model.py).
    """
    block = case.tokens * case.model.n_embd * case.residual_bytes if case.checkpointing else block_activations(case)
    norm = case.model.n_embd * (case.residual_bytes + case.compute_bytes) + 2 * FP32
    logits = case.part.vocabulary * case.compute_bytes
    return case.part.layers * block, case.tokens * (norm + logits + TOKEN_BYTES)


def peak_activations(case: Candidate) -> float:
    """The larger of two moments: in the loss, and in backward of the last block, when the logits are gone.

    Of p stages, the first then holds min(p, m) micro-batches (1F1B: Narayanan et al., arXiv:2104.04473, section 2.2.1).
    """
    model, part, (blocks, head) = case.model, case.part, saved_activations(case)
    rows = min(case.tokens, LOSS_ROWS if case.system.on_gpu else max(1, LOSS_ELEMENTS // model.vocab_size))
    if part.vocabulary < model.vocab_size:  # DeepSpeed's loss keeps all logits in fp32, twice
        rows = 2 * case.tokens
    gradients = case.tokens * (part.hidden + model.n_embd)  # of the MLP's hidden layer, and the residual stream
    # the gradient of the output projection waits for that of the embedding until the end of backward
    in_backward = case.compute_bytes * (gradients + part.head)
    in_backward += block_activations(case) if case.checkpointing else 0  # recomputed
    in_backward += min(case.layout.pipeline, case.micro_steps) * blocks
    return max(blocks + head + FP32 * part.vocabulary * rows, in_backward)


def gathered_parameters(case: Candidate) -> float:
    """FSDP2 holds the head and three blocks, or all; ZeRO-3 stage3_max_live_parameters; autocast a 16-bit copy."""
    part = case.part
    limit = case.zero.get("stage3_max_live_parameters", 1e9) if case.deepspeed else part.head + 3 * part.block
    limited = case.strategy.stage == 3 and not case.strategy.keeps_parameters
    count = min(part.parameters, limit) if limited else part.parameters
    count += part.parameters / case.system.gpus if "zero_hpz_partition_size" in case.zero else 0  # hpZ's second copy
    return case.compute_bytes * count if case.autocast or (case.gathers and part.shards > 1) else 0.0


def gradient_buffers(case: Candidate) -> float:
    """ZeRO: buckets and a flat copy, or in the optimizer step a partition's fp32 gradients; FSDP2: those of a block."""
    part, compute, stage = case.part, case.compute_bytes, case.strategy.stage
    if not case.deepspeed:
        return part.block * (compute + FP32) if stage == 3 else 0.0
    if stage == 0:
        return max(0.0, FP32 * min(part.parameters, ZERO0_BUCKET) - case.activations)
    bucket = case.zero.get("reduce_bucket_size", 5e8)
    copied: float = compute * min(part.parameters, max(bucket, part.block if stage == 3 else part.head))
    in_backward = copied + compute * min(part.parameters, bucket * (1 + case.overlap_comm))
    in_step = 0.0 if case.offloads else FP32 * min(part.partition, case.zero.get("sub_group_size", 1e9))
    if stage == 3:  # its one bucket stays allocated, and what it reduces is a copy
        return compute * min(part.parameters, bucket) + max(copied, in_step - case.activations)
    if stage == 1 and not case.overlap_comm:  # reduces when backward is done
        in_backward, in_step = 0.0, max(in_step, copied)
    return max(in_backward, in_step - case.activations)


def transfers(case: Candidate, forward: float, backward: float) -> list[tuple[float, float, float]]:
    """Bytes sent in a step, the seconds that takes, and the seconds of computing beside it, per kind of transfer.

    A ring sends 2 (n - 1) / n of an all-reduce's bytes, half as much of an all-gather's or a reduce-scatter's (Patarasu
    & Yuan, J. Parallel Distrib. Comput. 69, 2009). DDP all-reduces 4 P a step beside the last backward, ZeRO-0 after
    it. ZeRO-1 all-reduces and gathers c P a step, ZeRO-2 reduces in each micro-step (DeepSpeed all-reduces where the
    ZeRO paper, section 7, scatters). ZeRO-3 moves c P three times a micro-step: parameters for forward and backward,
    and gradients. FSDP2 does the same with gradients in fp32; HSDP also all-reduces shards between nodes.
    """
    system, part, stage, steps = case.system, case.part, case.strategy.stage, case.micro_steps
    tensor = case.layout.tensor  # tensor-parallel ranks have a ring each
    bandwidth = system.bandwidth(part.shards * tensor, tensor)
    ring = part.parameters - part.partition  # (n - 1) / n of P
    gradients, weights = FP32 * ring, case.compute_bytes * ring
    if stage == 0:
        return [(2 * gradients, 2 * gradients / bandwidth, 0.0 if case.deepspeed else backward)]
    if stage < 3:
        times = 1 if stage == 1 else steps
        reduced, beside = 2 * weights * times, backward * times if case.overlap_comm else 0.0
        return [(reduced, reduced / bandwidth, beside), (weights, weights / bandwidth, 0.0)]
    sent = steps * (case.gathers * weights + (weights if case.deepspeed else gradients))
    copies = system.ranks // (part.shards * tensor)
    crossing = steps * 2 * (copies - 1) / copies * FP32 * part.partition
    seconds = sent / bandwidth + crossing / system.bandwidth(system.ranks, system.gpus)
    return [(sent + crossing, seconds, steps * (forward + backward) if case.overlap_comm else 0.0)]


def layout_transfers(case: Candidate) -> list[tuple[float, float, float]]:
    """The same of tensor, sequence, expert and pipeline parallelism, for which computing waits.

    A block's forward and backward each have two all-reduces of tokens x width (Shoeybi et al., arXiv:1909.08053,
    section 3), all-to-alls of queries, keys, values and outputs (Ulysses, arXiv:2309.14509, section 3), and two of what
    experts get and return (arXiv:2006.16668, section 3). Recomputing repeats forward's. Stages pass on activations and
    gradients (arXiv:2104.04473, section 2.2), of which DeepSpeed sends a tensor-parallel rank's part.
    """
    model, layout, part, system = case.model, case.layout, case.part, case.system
    width = case.compute_bytes * case.tokens * model.n_embd  # bytes of a rank's activations between blocks
    others = {name: (size - 1) / size for name, size in vars(layout).items()}  # share of a group besides this rank
    passes = part.layers * (3 if case.checkpointing else 2)
    reduced = passes * width * others["tensor"] * (4 if part.mlp_ranks == layout.tensor else 2)
    exchanged = passes * width * others["sequence"] * part.heads / model.n_embd
    routed = passes * width * others["expert"] * 2 * model.n_active / part.mlp_ranks
    passed = 2 * width / layout.tensor if layout.pipeline > 1 else 0.0
    found = (
        (reduced, system.bandwidth(layout.tensor)),
        (exchanged, system.bandwidth(layout.tensor * layout.sequence, system.gpus)),
        (routed, system.bandwidth(layout.expert, system.gpus)),
        (passed, system.bandwidth(system.ranks, min(system.gpus, system.ranks // layout.pipeline))),
    )
    slots = case.micro_steps + layout.pipeline - 1  # the bubble waits for other stages' transfers, too
    return [(case.micro_steps * sent, slots * sent / rate, 0.0) for sent, rate in found]


def simplest(candidates: list[Candidate]) -> Candidate:
    """Among the fastest that fit, the simplest with the largest micro-batch; if none fits, the one nearest to it."""
    fitting = [case for case in candidates if case.spare >= 0]
    fitting = [case for case in fitting if case.spare >= ROOM * 1e9 * case.system.gpu_memory] or fitting
    if not fitting:
        return max(candidates, key=lambda case: case.spare)
    limit = (1 + ALIKE) * min(case.seconds for case in fitting)
    fast = [case for case in fitting if case.seconds <= limit]
    return min(fast, key=lambda case: (case.complexity, -case.batch))


def best_of_each(candidates: list[Candidate]) -> list[Candidate]:
    """The simplest of each strategy, whose candidates follow each other."""
    return [simplest(list(group)) for _, group in groupby(candidates, key=lambda case: case.strategy.name)]
