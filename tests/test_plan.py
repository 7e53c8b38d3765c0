"""The arithmetic of plan.py: published parameter counts and model states, activations as PyTorch saves them, rings."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from model import GPT
from training.memory import model_state
from training.plan import activations, hardware
from training.plan.activations import Precision
from training.plan.assumptions import attribute, values
from training.plan.case import Case
from training.plan.footprint import footprint
from training.plan.shapes import SHAPES, Shape, sized
from training.plan.strategies import STRATEGIES
from training.plan.system import System
from training.plan.timing import timing
from training.plan.traffic import transfers

PUBLISHED = {"gpt2": 124.44e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1557.6e6}
PUBLISHED |= {"llama2-7b": 6.74e9, "llama2-13b": 13.02e9, "llama-65b": 65.29e9, "gpt3-175b": 175e9, "gpt3-13b": 13e9}
PUBLISHED |= {"gpt3-125m": 125e6, "gpt3-350m": 350e6, "gpt3-760m": 760e6, "gpt3-1.3b": 1.3e9, "gpt3-2.7b": 2.7e9}
PUBLISHED |= {"gpt3-6.7b": 6.7e9}
SMALL = Shape("small", 3, 4, 64, vocab_size=512, block_size=64, bias=False)
ASSUMED: dict[str, Any] = {attribute(name): value for name, value in values({}).items()}
RATES: dict[str, Any] = {"flops": 312e12, "memory_rate": 2e12, "node_link": 300e9, "link": 50e9}
SYSTEM = System("A100-80GB", "cuda", gpus=8, nodes=1, dtype=torch.bfloat16, memory=80e9, **RATES, **ASSUMED)


def case(strategy: str, shape: Shape = SHAPES["gpt2-xl"], **changed) -> Case:
    return Case(shape, STRATEGIES[strategy], replace(SYSTEM, **changed))


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_as_published(name):
    tolerance = 0.02 if name.startswith("gpt3") else 0.001  # the GPT-3 paper rounds to two digits
    assert SHAPES[name].parameter_count() == pytest.approx(PUBLISHED[name], rel=tolerance)


def test_a_shape_for_a_number_of_parameters_has_about_so_many():
    for count in (1e9, 7.5e9, 1e12):
        own = replace(sized(int(count)), given=0).parameter_count()
        assert own == pytest.approx(count, rel=0.15) and sized(int(count)).parameter_count() == count


@pytest.mark.parametrize("bias", [True, False])
def test_vectors_and_blocks_are_those_of_the_model(bias):
    shape = replace(SMALL, bias=bias)
    with torch.device("meta"):
        model = GPT(shape.gpt())
    assert shape.vectors() == sum(p.numel() for p in model.parameters() if p.dim() == 1)
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    assert shape.block() == pytest.approx(block, abs=2 * shape.n_embd)  # the last norm is spread over them


def test_the_zero_papers_table_of_7_5_billion_parameters_on_64_gpus():
    """arXiv:1910.02054, figure 1: 120, 31.4, 16.6, 1.9 GB."""
    wanted = {"zero0": "120.0", "zero1": "31.4", "zero2": "16.6", "zero3": "1.9"}
    for strategy, gigabytes in wanted.items():
        held = model_state(strategy, 64, 7_500_000_000, torch.bfloat16, fp32_sums=False).total()
        assert f"{held / 1e9:.1f}" == gigabytes, strategy


@pytest.mark.parametrize("name", ["fsdp", "fsdp_grad_op", "fsdp_hsdp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp_partitions_16_bytes_a_parameter(name, dtype):
    found = case(name, nodes=4, dtype=dtype)
    shard = 8 if name == "fsdp_hsdp" else 32
    assert footprint(found, 1, False).model_state() == pytest.approx(16 * found.count / shard)


def saved_bytes(shape: Shape, batch: int, precision: Precision, checkpointing: bool) -> int:
    """Of all that forward saves for backward, parameters and by autocast their copies aside."""
    model = GPT(replace(shape.gpt(), activation_checkpointing=checkpointing)).init_weights(1).train()
    if precision.half and not precision.autocast:
        model.to(torch.bfloat16)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        copy = (
            precision.autocast and {tuple(tensor.shape), tuple(tensor.t().shape) if tensor.dim() == 2 else ()} & shapes
        )
        if tensor.untyped_storage().data_ptr() not in own and not copy:
            seen[tensor.untyped_storage().data_ptr()] = tensor  # which keeps the address from being used again
        return tensor

    tokens = torch.randint(0, shape.vocab_size, (batch, shape.block_size))
    autocast = torch.autocast("cpu", torch.bfloat16) if precision.autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model(tokens, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("half, autocast", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [SMALL, Shape("wide", 2, 2, 96, 257, 128, True)], ids=lambda shape: shape.name)
def test_activations_as_pytorch_saves_them(half, autocast, dropout, checkpointing, shape):
    shape, precision = replace(shape, dropout=dropout), Precision(half, autocast, on_gpu=False)
    predicted = activations.saved(shape, 5, precision, checkpointing)  # 5: no activation has the shape of a weight
    assert predicted == pytest.approx(saved_bytes(shape, 5, precision, checkpointing), rel=0.02)


def test_a_block_in_terms_of_the_activation_paper():
    """arXiv:2205.05198, equation 1: s b h (34 + 5 a s / h); here flash attention, and no dropout: 32 s b h."""
    shape, tokens = SHAPES["gpt3-6.7b"], 2048
    unit = tokens * shape.n_embd
    assert activations.of_block(shape, tokens, Precision(True)) / unit == pytest.approx(32, rel=0.01)
    assert activations.of_block(shape, tokens, Precision(True, autocast=True)) / unit == pytest.approx(36, rel=0.01)
    masks = activations.of_block(replace(shape, dropout=0.1), tokens, Precision(True))
    assert masks / unit == pytest.approx(34, rel=0.01)


def sent(strategy: str, micro_steps: int = 1, **changed) -> float:
    """Per parameter."""
    found = case(strategy, **changed)
    return sum(t.times * t.sent() for t in transfers(found, micro_steps)) / found.count


def test_what_a_rank_sends():
    ring = 7 / 8
    assert sent("ddp") == sent("ddp", 4) == pytest.approx(2 * 4 * ring), "an all-reduce in fp32, once a step"
    assert sent("zero1", 4) == pytest.approx((2 * 2 + 2) * ring), "gradients, then the updated weights"
    assert sent("zero2", 4) == pytest.approx((4 * 2 * 2 + 2) * ring), "gradients in every micro-step"
    assert sent("fsdp", 3) > sent("fsdp_grad_op", 3) == pytest.approx(3 * (2 + 4) * ring), "weights are gathered once"
    assert sent("zero3", 3) == pytest.approx(3 * (2 + 2 + 2) * ring), "weights for forward and backward, and gradients"
    assert sent("single", gpus=1) == sent("ddp", gpus=1) == 0


def test_over_gloo_fsdp_scatters_by_an_all_reduce():
    """Of 10.8M parameters in fp32, 86.0 MB a step were counted under FSDP2, 64.8 MB under ZeRO-3."""
    assert sent("zero3", kind="cpu", gpus=2, dtype=torch.float32) == pytest.approx(4 * (1 + 1 + 1) / 2)
    assert sent("fsdp_grad_op", kind="cpu", gpus=2, dtype=torch.float32) == pytest.approx(4 * (1 + 2) / 2)


def test_between_nodes_the_slower_link_decides():
    inside, between = case("ddp"), case("ddp", nodes=2)
    assert inside.system.link_of(8) == 0.8 * 300e9 and between.system.link_of(16) == 0.8 * 50e9
    assert timing(between, 1, False, 1).communication > 4 * timing(inside, 1, False, 1).communication


def test_the_time_of_a_step():
    found = timing(case("single", gpus=1), 8, False, 3)
    flops = 3 * 8 * 1024 * SHAPES["gpt2-xl"].flops_per_token()
    assert found.computing == pytest.approx(flops / (0.5 * 312e12)) and found.communication == 0
    assert timing(case("single", gpus=1), 8, True, 3).computing == pytest.approx(found.computing * 4 / 3)
    slow = timing(case("zero3_nvme"), 8, False, 3)
    assert slow.update > timing(case("zero3_offload"), 8, False, 3).update > timing(case("zero3"), 8, False, 3).update


def test_offload_moves_bytes_to_the_host_and_to_nvme():
    """The same bytes, in another place."""
    base = footprint(case("zero3"), 1, False).model_state()
    host, nvme = footprint(case("zero3_offload"), 1, False), footprint(case("zero3_nvme"), 1, False)
    assert host.model_state() == 0 and host.host == pytest.approx(8 * base)
    weights_and_states = (2 + 12) / (2 + 4 + 12)
    assert nvme.nvme == pytest.approx(8 * base * weights_and_states) and nvme.host > 8 * base / 18 * 4
    kept = footprint(case("zero2_offload"), 1, False)
    assert kept.weights == 2 * SHAPES["gpt2-xl"].parameter_count() and kept.optimizer_states == kept.gradients == 0


def test_buckets_of_the_json_are_counted():
    """zero2: two of 5e7 elements, as they overlap, and the copy of the largest matrix that is reduced."""
    shape = SHAPES["gpt2-xl"]
    assert footprint(case("zero2"), 1, False).buffers == 2 * (2 * 5e7 + shape.head())
    assert case("zero3", SHAPES["gpt3-175b"]).gathered() == 1e9, "stage3_max_live_parameters"


def test_zero3_gathers_what_others_have():
    """Of one rank nothing; else, when forward ends, 4 matrices of a block's 9 modules are ahead."""
    found = case("zero3")
    assert found.gathered() == pytest.approx(4 / 9 * found.count) and case("zero3", gpus=1).gathered() == 0


def test_ddps_buckets_are_beside_gradients_of_several_micro_steps():
    once, several = (footprint(case("ddp"), 1, False, micro_steps).buffers for micro_steps in (1, 2))
    assert once == 0 and several == 4 * SHAPES["gpt2-xl"].parameter_count()


def test_on_a_cpu_a_bucket_fills_while_activations_go():
    """ZeRO-2: its bucket and the copy that is reduced, 2 x 4 bytes an element, are there when activations are not."""
    few, many = (footprint(case("zero2", SMALL, kind="cpu", dtype=torch.float32), n, False) for n in (1, 64))
    count = SMALL.parameter_count()
    assert few.activations + few.buffers == pytest.approx(max(few.activations, 2 * 4 * count))
    assert many.activations > 2 * 4 * count and many.buffers == 0


def test_every_device_has_its_peak():
    for name in hardware.TABLE:
        found = hardware.device(name)
        assert found.half > found.single > 1e12 and found.memory >= 16e9 and hardware.link(found.link, "") > 1e9
