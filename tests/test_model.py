"""The model: initial weights, loss, parameter and FLOP counts, generation."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, CrossEntropy, GPTConfig, MoE, initial_value
from sample import SampleConfig, choose_token
from tests.checkpoints import greedy, initialized

SMALL = GPTConfig(block_size=16, vocab_size=61, n_layer=3, n_head=2, n_embd=32, bias=True)
LLAMA = replace(SMALL, bias=False, norm="rmsnorm", mlp="swiglu", n_hidden=88, n_head=4, head_size=8, n_kv_head=2)
LLAMA = replace(LLAMA, rope_theta=10000.0, tied=False)
MOE = replace(LLAMA, n_expert=4, n_hidden=24)
QWEN3 = replace(LLAMA, head_size=12, qk_norm=True, qkv_bias=True, tied=True, mlp="relu2")


def make(config: GPTConfig = SMALL, seed: int = 1) -> GPT:
    return initialized(GPT(config), seed).eval()


def text(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(length))


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(text(), text().roll(1)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [SMALL, QWEN3])
def test_a_weight_is_a_function_of_its_name_and_the_seed(config):
    model, other = make(config), make(config, seed=2)
    with torch.device("meta"):
        late = GPT(config)
    initialized(late.materialize(torch.device("cpu")), 1)
    for name, parameter in reversed(list(model.named_parameters())):
        assert torch.equal(parameter, initial_value(name, parameter.shape, config, 1)), name
        assert torch.equal(parameter, late.get_parameter(name)), name
        if parameter.dim() == 2:
            assert not torch.equal(parameter, other.get_parameter(name)), name
            assert 0.92 < parameter.std() / (0.02 / math.sqrt(6) if "c_proj" in name else 0.02) < 1.08, name
        else:
            assert torch.all(parameter == (0 if name.endswith("bias") else 1)), name
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert len({p.sum().item() for p in matrices}) == len(matrices) >= 1 + 3 * 4, "the name does not matter"


@pytest.mark.parametrize(
    "name", ["transformer.h.0.norm.weight", "transformer.h.0.norm.bias", "transformer.h.0.attn.c_attn.scale", "scale"]
)
def test_a_parameter_without_a_rule_has_no_initial_value(name):
    with pytest.raises(ValueError, match=f"parameter '{name}' has no initial value: add a rule for"):
        initial_value(name, torch.Size([3]), SMALL, 1)


class Rotary(torch.nn.Module):
    """A module with buffers: one in the state dict, one not."""

    def __init__(self):
        super().__init__()
        self.reset_buffers()

    def reset_buffers(self) -> None:
        # not linspace, which transformers, in the same process, can hide from `with torch.device("meta")`
        angles = torch.outer(torch.arange(16.0), 10000 ** -(torch.arange(8.0) / 7))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin())


def test_buffers_of_a_model_built_on_meta_hold_their_values():
    with torch.device("meta"):
        late = GPT(SMALL)
        late.get_submodule("transformer.h.1.attn").add_module("rotary", Rotary())
    assert late.get_buffer("transformer.h.1.attn.rotary.cos").is_meta
    for buffer_device in (None, torch.device("cpu")):
        late.materialize(torch.device("cpu"), buffer_device)
        for name, expected in Rotary().named_buffers():
            assert torch.equal(late.get_buffer(f"transformer.h.1.attn.rotary.{name}"), expected)
    assert [name for name in late.state_dict() if "rotary" in name] == ["transformer.h.1.attn.rotary.sin"]


def test_a_buffer_that_cannot_be_computed_again_is_an_error():
    late = GPT(SMALL)
    late.transformer.h[0].register_buffer("mask", torch.ones(3))
    with pytest.raises(AssertionError, match=r"transformer.h.0 has buffers: compute them in reset_buffers"):
        late.materialize(torch.device("cpu"))


def test_building_a_model_draws_no_random_numbers():
    """Parameters are not initialized twice, which takes seconds for a large model."""
    before = torch.get_rng_state()
    GPT(SMALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_embedding_and_output_are_one_matrix_also_of_a_model_built_on_meta():
    with torch.device("meta"):
        late = GPT(SMALL)
    for model in (make(), late.materialize(torch.device("cpu"))):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, bias=False), LLAMA, QWEN3])
def test_the_model_counts_its_own_parameters_and_flops(config):
    model = make(config)
    assert config.parameter_count() == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(text(), text()).backward()
    tokens, T = 2 * 16, 16
    # forward and backward of both matmuls of attention, at every position, masked or not
    attention = 3 * 2 * 2 * config.n_layer * config.n_head * config.head_size * T
    small = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # in PaLM's N, but in no matmul
    counted = counter.get_total_flops() / tokens
    # PyTorch counts the attention of some devices only
    assert config.flops_per_token() in (counted + 6 * small, counted + 6 * small + attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts_is_the_weighted_sum_of_each_tokens_experts(dtype):
    model = make(MOE).requires_grad_(False)
    moe: Any = next(module for module in model.modules() if isinstance(module, MoE))
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    moe.router["gate"].weight.mul_(20)  # experts that differ
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = moe(x)
    probabilities = F.softmax(x.flatten(0, 1) @ moe.router.weight.T, dim=-1)
    expected = torch.zeros(32, 32)
    for token, row in enumerate(x.flatten(0, 1)):
        best = sorted(range(4), key=lambda expert: -probabilities[token, expert])[:2]
        for expert in best:
            w1, w2, w3 = (w[expert] for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3))
            share = probabilities[token, expert] / probabilities[token, best].sum()
            expected[token] += share * (w2 @ (F.silu(w1 @ row) * (w3 @ row)))
    assert found.dtype == x.dtype and expected.abs().max() > 1e-3
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        found.flatten(0, 1), expected, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 0.05)
    )


def test_the_flops_of_experts_are_those_of_the_active_ones():
    dense = replace(MOE, n_expert=0, n_hidden=2 * MOE.n_hidden)
    router = 6 * MOE.n_layer * MOE.n_expert * MOE.n_embd
    assert MOE.flops_per_token() == dense.flops_per_token() + router
    assert MOE.parameter_count() > 1.2 * dense.parameter_count()


def test_gpt2s_sizes_are_those_of_its_paper():
    sizes = {(12, 12, 768): 124, (24, 16, 1024): 355, (36, 20, 1280): 774, (48, 25, 1600): 1558}
    for (layers, heads, width), millions in sizes.items():
        config = GPTConfig(vocab_size=50257, n_layer=layers, n_head=heads, n_embd=width)
        assert round(config.parameter_count() / 1e6) == millions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_and_its_gradient_are_those_of_pytorch(dtype):
    """In the dtype of the logits: fp32 exactly, half precision to the rounding of the result."""
    logits = torch.randn(70000, 61, generator=torch.Generator().manual_seed(0)).to(dtype)  # more than one piece
    targets = torch.randint(61, (70000,))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    scale = 65536 if dtype == torch.float16 else 3
    loss = CrossEntropy.apply(ours * 1, targets)
    (loss * scale).backward()
    expected = F.cross_entropy(theirs.float(), targets)
    (expected * scale).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-8)


def test_no_gradient_of_gpt2s_vocabulary_underflows_in_fp16():
    """A softmax over 50,304 ids is 2e-5; divided by the number of tokens before the loss scale, it would become 0."""
    logits = (0.3 * torch.randn(1024, 50304, generator=torch.Generator().manual_seed(0))).half()
    targets = torch.randint(50257, (1024,))
    ours, exact = logits.clone().requires_grad_(), logits.float().requires_grad_()
    (CrossEntropy.apply(ours * 1, targets) * 65536).backward()
    (F.cross_entropy(exact, targets) * 65536).backward()
    assert ours.grad is not None and exact.grad is not None
    assert (ours.grad == 0).sum() == 0
    assert (ours.grad - exact.grad).norm() < 1e-4 * exact.grad.norm()
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, targets[:, None], False)
    assert (ours.grad - exact.grad)[others].norm() < 2e-3 * exact.grad[others].norm()


@pytest.mark.parametrize("training", [True, False])
def test_no_copy_of_all_logits_is_made_in_fp32(training):
    sizes = list[int]()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (result,) if isinstance(x, torch.Tensor) and x.dtype == torch.float32)
            return result

    model = make(replace(SMALL, vocab_size=50304))
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16), Sizes():
        model(text(batch=10), text(batch=10).roll(1))
    weights = 50304 * SMALL.n_embd
    assert max(size for size in sizes if size != weights) <= 2**21 < 10 * 16 * 50304


def test_the_loss_keeps_one_copy_of_the_logits_in_the_dtype_of_the_matmul():
    saved: list[torch.Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t)
    with keep, torch.autocast("cpu", torch.bfloat16):
        make()(text(length=10), text(length=10))
    assert [t.dtype for t in saved if t.shape == (2 * 10, 61)] == [torch.bfloat16]


@pytest.mark.parametrize("mixed", [False, True])
def test_training_and_evaluation_give_the_same_loss(mixed):
    model = make()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        with torch.no_grad():
            expected = model(text(), text().roll(1))
        torch.testing.assert_close(model(text(), text().roll(1)).detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_computes_twice_and_changes_no_gradient(dropout):
    model = make(replace(SMALL, dropout=dropout)).train()
    passes: list[int] = []
    model.get_submodule("transformer.h.0.mlp").register_forward_pre_hook(lambda *_: passes.append(1))
    plain = gradients(model)
    assert len(passes) == 1
    for module in model.modules():
        if hasattr(module, "config"):
            vars(module)["config"] = replace(SMALL, dropout=dropout, activation_checkpointing=True)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, plain[name]), name
    assert len(passes) == 3


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_where_gpt2_has_it_and_in_training_only(training):
    model, zeros = make(replace(SMALL, dropout=0.5)).train(training), {}
    for place in ("ln_1", "attn.c_proj", "attn", "mlp"):  # ln_1 reads the embeddings, attn.c_proj the attention

        def note(_, x: tuple[torch.Tensor], y: torch.Tensor, place: str = place) -> None:
            seen = y[:, -1] if place in ("attn", "mlp") else x[0][:, 0]  # position 0 attends to itself only
            zeros[place] = (seen == 0).float().mean().item()

        model.get_submodule(f"transformer.h.0.{place}").register_forward_hook(note)
    torch.manual_seed(0)
    model(text(batch=200))
    assert len(zeros) == 4 and zeros == pytest.approx(dict.fromkeys(zeros, 0.5 * training), abs=0.1)


def uncached(model: GPT, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy, with a whole forward for each token."""
    with torch.no_grad():
        for _ in range(count):
            logits = model(tokens[:, -SMALL.block_size :])
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    return tokens


@pytest.mark.parametrize("config", [SMALL, QWEN3])
@pytest.mark.parametrize("start", [1, 5, 16, 20])
def test_cached_text_is_the_text_of_whole_forwards_also_past_block_size(start, config):
    model = make(config)
    for parameter in model.transformer.h.parameters():
        parameter.data *= 10  # or the last token alone would decide
    tokens = text(length=start)
    generated = model.generate(tokens, 30, greedy)
    assert generated.shape == (2, start + 30) and len(generated[0, start:].unique()) >= 10
    assert torch.equal(generated, uncached(model, tokens, 30))


def test_padding_ids_are_never_drawn():
    model = make()
    with torch.no_grad():
        model.lm_head.weight[50:] = 0
        model.lm_head.weight[:50] -= 10  # the padding would win
    ids = model.generate(text(length=4) % 50, 100, lambda logits: choose_token(logits, 2.0, 0, 1.0, vocab_size=50))
    assert ids.max() < 50


def frequencies(logits: list[float], **options) -> dict[int, float]:
    torch.manual_seed(0)
    ids = choose_token(
        torch.tensor([logits]).repeat(20_000, 1),
        **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "vocab_size": 4, **options},
    )
    ids, counts = ids.unique(return_counts=True)
    return dict(zip(ids.tolist(), (counts / 20_000).tolist(), strict=True))


def test_sampling():
    logits = [math.log(p) for p in (0.1, 0.5, 0.15, 0.25)]
    assert frequencies(logits) == pytest.approx({0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}, abs=0.015)
    assert frequencies(logits, top_k=2) == pytest.approx({1: 2 / 3, 3: 1 / 3}, abs=0.015)
    assert frequencies(logits, top_k=9).keys() == {0, 1, 2, 3}
    assert frequencies(logits, top_p=0.6) == pytest.approx(
        {1: 2 / 3, 3: 1 / 3}, abs=0.015
    )  # keeps the token that crosses 0.6
    assert frequencies(logits, top_p=0.4) == {1: 1.0}
    assert frequencies(logits, temperature=0) == {1: 1.0}
    squares = {0: 0.01, 1: 0.25, 2: 0.0225, 3: 0.0625}
    cold = {i: p / sum(squares.values()) for i, p in squares.items()}
    assert frequencies(logits, temperature=0.5) == pytest.approx(cold, abs=0.015), "sharper"
    roots = {i: p**0.25 for i, p in squares.items()}
    hot = {i: p / sum(roots.values()) for i, p in roots.items()}
    assert frequencies(logits, temperature=2) == pytest.approx(hot, abs=0.015), "more random"


def test_help_of_sample_says_what_the_temperature_does():
    meaning = SampleConfig.__dataclass_fields__["temperature"].metadata["meaning"]
    assert meaning == "below 1 sharper, above 1 more random, 0 greedy"  # as test_sampling proves


def test_a_text_longer_than_block_size_is_an_error_in_training():
    with pytest.raises(AssertionError, match="17 tokens > block_size 16"):
        make()(text(length=17))
