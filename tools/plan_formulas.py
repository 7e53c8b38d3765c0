"""Memory of a rank, what it sends, how long a step takes, by formulas with their sources; the best candidates.

P: parameters; b: sequences per rank and micro-step; s: tokens per sequence; h: width; V: vocabulary; c: bytes per
number in matmuls (2 or 4); n: ranks that take part. Sizes are bytes of one rank.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch

from model import GPTConfig
from training.config import ROOT, Settings, key
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


@dataclass
class Candidate:
    """A model under a strategy with a micro-batch, on a system, and what is predicted for it."""

    model: GPTConfig
    strategy: Strategy
    system: Machines
    batch: int  # sequences per rank and micro-step
    micro_steps: int
    checkpointing: bool

    def __post_init__(self) -> None:
        model, strategy, system = self.model, self.strategy, self.system
        self.parameters = model.parameter_count()
        self.head = model.vocab_size * model.n_embd  # the largest matrix, which embeds tokens and projects to logits
        positions = 0 if model.rope_theta else model.block_size * model.n_embd
        self.block = (self.parameters - self.head * (1 if model.tied else 2) - positions) // model.n_layer
        self.hidden = (4 if model.mlp == "swiglu" else 2) * model.n_hidden  # what the MLP's activation saves
        self.deepspeed = strategy.script == "train_deepspeed.py"
        self.zero: dict[str, Any] = {}
        if self.deepspeed:
            config = json.loads((ROOT / strategy.arguments[0].removeprefix("--deepspeed_config=")).read_text())
            zero = config.get("zero_optimization", {})  # "auto" as in the Hugging Face Trainer
            self.zero = {name: model.n_embd**2 if value == "auto" else value for name, value in zero.items()}
        self.offloads = strategy.optimizer_device != "gpu" and system.on_gpu  # CPU ranks have only one memory
        self.shards = system.gpus if strategy.hybrid else system.ranks  # ranks that share one copy of the model state
        self.compute_bytes = FP32 if system.dtype == "float32" else 2
        # parameters, norms and the residual stream stay in fp32 while matmuls are in half precision
        self.autocast = strategy.stage == 0 and self.compute_bytes < FP32
        self.residual_bytes = FP32 if self.autocast else self.compute_bytes
        self.tokens = self.batch * model.block_size  # per micro-step
        # whether stages 1 to 3 communicate beside computing; FSDP2 always does
        overlaps = not self.deepspeed or self.zero.get("overlap_comm", strategy.stage == 3)  # DeepSpeed's default
        self.overlap_comm = system.on_gpu and bool(overlaps)
        # how often a micro-step gathers the parameters; FSDP2's root unit keeps the head until backward
        again = 0.0 if strategy.keeps_parameters else 1.0 if self.deepspeed else 1 - self.head / self.parameters
        self.gathers = 1 + again if strategy.stage == 3 else 0.0
        self.predict_memory()
        self.predict_time()

    def predict_memory(self) -> None:
        """Bytes of a rank at peak; host and nvme per node.

        Model state: (2 + 2 + 12) P bytes less what is partitioned (ZeRO, arXiv:1910.02054, section 3.1). DDP, FSDP2 and
        fp32 have 4 + 4 + 8. DDP's buckets, 4 P, lie beside gradients that several micro-steps add up.
        """
        strategy, system = self.strategy, self.system
        name = f"zero{strategy.stage}" if self.deepspeed else strategy.name  # whatever the JSON is called
        state = model_state_bytes(name, self.shards, self.parameters, getattr(torch, system.dtype))
        sizes = by_device(state, strategy.optimizer_device, strategy.parameter_device)
        on_host = sizes["cpu"] if system.on_gpu else 0.0
        self.model_state = sizes["gpu"] + sizes["cpu"] - on_host
        self.host, self.nvme = system.gpus * on_host, system.gpus * sizes["nvme"]
        self.activations = peak_activations(self)
        self.buffers = gathered_parameters(self) + gradient_buffers(self)
        self.other = 1e9 * system.baseline + system.fragmentation * (self.activations + self.buffers)
        self.buffers += FP32 * self.parameters if strategy.name == "ddp" and self.micro_steps > 1 else 0
        self.memory = self.model_state + self.activations + self.buffers + self.other

    def predict_time(self) -> None:
        """s b (6 P + 12 L h s) FLOPs a micro-step (PaLM, arXiv:2204.02311, appendix B), a third more to recompute.

        Communication counts where it is longer than the `overlap` share of the computing beside it. The update moves 40
        bytes a parameter of the shard; offload moves weights and gradients over PCIe in each micro-step.
        """
        system, strategy, work = self.system, self.strategy, RECOMPUTED if self.checkpointing else 1.0
        once = self.tokens * self.model.flops_per_token() / (1e12 * system.tflops * system.achievable)
        self.computing = self.micro_steps * work * once
        found = transfers(self, FORWARD * once, (work - FORWARD) * once)
        self.sent = sum(sent for sent, _, _ in found)
        self.communication = sum(max(0.0, seconds - system.overlap * beside) for _, seconds, beside in found)
        shard = self.parameters / (self.shards if strategy.stage else 1)
        bandwidth = HOST_BANDWIDTH / system.gpus if self.offloads else 1e9 * system.memory_bandwidth
        self.update = shard * UPDATE_BYTES / bandwidth
        if self.offloads:
            slowest = NVME_BANDWIDTH / system.gpus if strategy.parameter_device == "nvme" else HOST_LINK
            seconds = self.micro_steps * (1 / HOST_LINK + self.gathers / slowest) + 1 / HOST_LINK
            self.communication += seconds * self.compute_bytes * self.parameters / self.shards
        if strategy.optimizer_device == "nvme":
            self.update += 2 * SWAP_BYTES * shard * system.gpus / NVME_BANDWIDTH
        self.seconds = self.computing + self.communication + self.update

    def spare(self) -> float:
        """Bytes of the device that stay free; negative if the candidate does not fit."""
        return 1e9 * self.system.gpu_memory - self.memory

    def tokens_per_second(self) -> float:
        return self.tokens * self.micro_steps * self.system.ranks / self.seconds

    def mfu(self) -> float:
        """Model FLOP/s, without recomputation, over the matmul peak or the measured ceiling."""
        return self.tokens_per_second() * self.model.flops_per_token() / (self.system.ranks * 1e12 * self.system.tflops)


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
    """
    model = case.model
    attention = 2 * (model.n_head + model.n_kv_head) * model.head_size  # queries, keys, values; the input of c_proj
    # inputs of 2 norms | of c_attn and c_fc, attention, the MLP's activation and the input of its c_proj
    saved = 2 * case.residual_bytes * model.n_embd + case.compute_bytes * (2 * model.n_embd + attention + case.hidden)
    masks = 2 * model.n_embd if model.dropout else 0  # one byte per element
    statistics = FP32 * (4 + model.n_head)  # mean and deviation of two norms, logsumexp of each head
    return case.tokens * (saved + masks + statistics)


def head_activations(case: Candidate) -> float:
    """The last norm, the output projection, and c s b V of logits, whose gradient takes their place (model.py)."""
    norm = case.model.n_embd * (case.residual_bytes + case.compute_bytes) + 2 * FP32
    return case.tokens * (norm + case.model.vocab_size * case.compute_bytes + TOKEN_BYTES)


def saved_activations(case: Candidate) -> float:
    """At the end of forward. With activation checkpointing a block saves its input only (section 5 of that paper)."""
    block = case.tokens * case.model.n_embd * case.residual_bytes if case.checkpointing else block_activations(case)
    return case.model.n_layer * block + head_activations(case)


def peak_activations(case: Candidate) -> float:
    """The larger of two moments: in the loss, and in backward of the last block, when the logits are gone."""
    model = case.model
    rows = LOSS_ROWS if case.system.on_gpu else max(1, LOSS_ELEMENTS // model.vocab_size)
    in_loss = FP32 * model.vocab_size * min(case.tokens, rows)
    gradients = case.tokens * (case.hidden + model.n_embd)  # of the MLP's hidden layer, and the residual stream
    # the gradient of the output projection waits for that of the embedding until the end of backward
    in_backward = case.compute_bytes * (gradients + case.head) - head_activations(case)
    in_backward += block_activations(case) if case.checkpointing else 0  # recomputed
    return saved_activations(case) + max(in_loss, in_backward)


def gathered_parameters(case: Candidate) -> float:
    """FSDP2 holds the head and three blocks, or all; ZeRO-3 stage3_max_live_parameters; autocast a 16-bit copy."""
    limit = case.zero.get("stage3_max_live_parameters", 1e9) if case.deepspeed else case.head + 3 * case.block
    limited = case.strategy.stage == 3 and not case.strategy.keeps_parameters
    count = min(case.parameters, limit) if limited else case.parameters
    count += case.parameters / case.system.gpus if "zero_hpz_partition_size" in case.zero else 0  # hpZ's second copy
    return case.compute_bytes * count if case.autocast or (case.gathers and case.shards > 1) else 0.0


def gradient_buffers(case: Candidate) -> float:
    """ZeRO: buckets and a flat copy, or in the optimizer step a partition's fp32 gradients; FSDP2: those of a block."""
    compute, stage = case.compute_bytes, case.strategy.stage
    if not case.deepspeed:
        return case.block * (compute + FP32) if stage == 3 else 0.0
    if stage == 0:
        return max(0.0, FP32 * min(case.parameters, ZERO0_BUCKET) - case.activations)
    bucket = case.zero.get("reduce_bucket_size", 5e8)
    copied: float = compute * min(case.parameters, max(bucket, case.block if stage == 3 else case.head))
    in_backward = copied + compute * min(case.parameters, bucket * (1 + case.overlap_comm))
    in_step = 0.0 if case.offloads else FP32 * min(case.parameters / case.shards, case.zero.get("sub_group_size", 1e9))
    if stage == 3:  # its one bucket stays allocated, and what it reduces is a copy
        return compute * min(case.parameters, bucket) + max(copied, in_step - case.activations)
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
    system, stage, steps = case.system, case.strategy.stage, case.micro_steps
    ring, rate = (case.shards - 1) / case.shards, system.link_share * 1e9 / 8  # bytes/s per Gbit/s
    between = rate * min(system.node_link, system.link)
    bandwidth = rate * system.node_link if case.shards <= system.gpus else between
    gradients, weights = FP32 * case.parameters, case.compute_bytes * case.parameters
    if stage == 0:
        sent = 2 * ring * gradients
        return [(sent, sent / bandwidth, 0.0 if case.deepspeed else backward)]
    if stage < 3:
        times, gathered = 1 if stage == 1 else steps, ring * weights
        reduced, beside = 2 * gathered * times, backward * times if case.overlap_comm else 0.0
        return [(reduced, reduced / bandwidth, beside), (gathered, gathered / bandwidth, 0.0)]
    sent = steps * ring * (case.gathers * weights + (weights if case.deepspeed else gradients))
    copies = system.ranks // case.shards
    crossing = steps * 2 * (copies - 1) / copies * gradients / case.shards
    seconds = sent / bandwidth + crossing * system.gpus / between  # all ranks of a node share its link
    return [(sent + crossing, seconds, steps * (forward + backward) if case.overlap_comm else 0.0)]


def fast(candidates: list[Candidate]) -> list[Candidate]:
    """The fastest that fits, and those about as fast; only those that leave ROOM, if there are any."""
    fitting = [candidate for candidate in candidates if candidate.spare() >= 0]
    fitting = [c for c in fitting if c.spare() >= ROOM * 1e9 * c.system.gpu_memory] or fitting
    fastest = min((candidate.seconds for candidate in fitting), default=0.0)
    return [candidate for candidate in fitting if candidate.seconds <= fastest * (1 + ALIKE)]


def best_of_each(candidates: list[Candidate]) -> list[Candidate]:
    """Per strategy the largest micro-batch of the fast ones that fit; if none fits, the one that needs least memory."""
    bests = []
    for name in dict.fromkeys(candidate.strategy.name for candidate in candidates):
        group = [candidate for candidate in candidates if candidate.strategy.name == name]
        bests.append(max(fast(group), key=lambda c: c.batch, default=max(group, key=Candidate.spare)))
    return bests


def recommend(bests: list[Candidate]) -> Candidate | None:
    """The simplest of the fast ones that fit, which offloads least and partitions least; None if none fits."""
    places = ("gpu", "cpu", "nvme")
    return min(fast(bests), key=lambda c: (places.index(c.strategy.optimizer_device), c.strategy.stage), default=None)
