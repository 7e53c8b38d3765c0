"""The planner's formulas for tensor, pipeline, sequence and expert parallelism, held to papers, our code and runs."""

import dataclasses
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from model import GPT, CausalSelfAttention, GPTConfig
from tests import test_plan
from tests.checkpoints import initialized
from tests.running import ROOT, TINY, run, zero_json
from tests.test_plan import SYSTEM, saved_bytes
from tests.test_plan_command import request
from tools import plan_formulas
from tools.plan import MODELS, command, config_lines, print_curve, print_report
from tools.plan_formulas import Candidate, best_of_each, block_activations, layout_transfers, simplest, transfers
from training.config import TrainConfig
from training.deepspeed_layout import EXPERTS
from training.deepspeed_parallel import cuts
from training.distributed import Layout
from training.errors import ConfigError
from training.model_state import model_shapes
from training.parallel import attend
from training.strategies import find_strategy

GPT3 = GPTConfig(*MODELS["gpt3-175b"])
SMALL = GPTConfig(64, 512, 4, 4, 256, bias=False)
LLAMA = replace(SMALL, tied=False, mlp="swiglu", n_hidden=512, n_kv_head=2, norm="rmsnorm", rope_theta=1e4)
MOE = replace(LLAMA, n_expert=4, n_active=2)
TP, PP, SP, EP = Layout(tensor=8), Layout(pipeline=8), Layout(sequence=8), Layout(expert=4)


def case(
    layout: Layout,
    strategy: str = "zero1",
    batch: int = 1,
    micro_steps: int = 1,
    checkpointing: bool = False,
    **changed: Any,
) -> Candidate:
    """GPT-3 on 8 A100, or what is changed of it."""
    model = changed.pop("model", GPT3)
    system = replace(SYSTEM, **changed)
    return Candidate(model, find_strategy(strategy), system, batch, micro_steps, checkpointing, layout)


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(expert=2), Layout(tensor=2, expert=2)], ids=str)
@pytest.mark.parametrize(
    "model", [SMALL, LLAMA, MOE, replace(SMALL, vocab_size=257)], ids=["tied", "untied", "experts", "odd"]
)
def test_parameters_of_a_rank_are_those_that_the_cuts_leave_it(model, layout):
    by_name, count = cuts(model, layout), 0.0
    for name, shape in model_shapes(model).items():
        count += shape.numel() / (layout.expert if EXPERTS in name else layout.tensor if name in by_name else 1)
    assert case(layout, "zero3", model=model).part.parameters == pytest.approx(count, rel=0.002)


def test_a_stage_of_gpt3():
    """12 of 96 blocks with 12 h^2 + 13 h parameters each, and the embeddings of 50,257 tokens and 2,048 positions."""
    h = 12288
    block = 12 * h**2 + 13 * h
    assert case(PP).part.parameters == pytest.approx(12 * block + (50257 + 2048) * h)
    both = replace(PP, tensor=8)
    count = case(both, nodes=8).part.parameters
    assert count == pytest.approx(12 * block / 8 + (50257 + 2048) * h), "embeddings stay whole"
    assert case(both, nodes=8).model_state == pytest.approx(20 * count), "nothing to partition"
    assert case(both, nodes=16).model_state == pytest.approx((2 + 6 + 12 / 2) * count)


def test_ranks_that_share_sequences_are_zeros_too():
    """All / (tensor x pipeline) of them; experts are over as many as hold the same ones."""
    assert case(SP, "zero3", nodes=2).part.partition == case(Layout(), "zero3", nodes=2).part.partition
    assert case(SP, "fsdp").model_state == case(Layout(), "fsdp").model_state
    experts = 4 * 4 * 3 * 512 * 256  # layers x experts x matrices
    split, whole = case(Layout(expert=4), model=MOE), case(Layout(), model=MOE)
    assert whole.part.parameters - split.part.parameters == pytest.approx(experts * 3 / 4)
    assert split.part.partition == pytest.approx(whole.part.partition), (
        "12 bytes of each parameter are on one rank, whatever the split"
    )


def test_activations_of_tensor_parallelism_as_in_the_paper():
    """arXiv:2205.05198, equation 2: s b h (10 + 24 / t), of which dropout 2; without the attention matrix."""
    unit = GPT3.block_size * GPT3.n_embd
    for size in (1, 2, 8):
        assert block_activations(case(Layout(tensor=size))) / unit == pytest.approx(8 + 24 / size, rel=0.01)
    dropout = replace(GPT3, dropout=0.1)
    assert block_activations(case(TP, model=dropout)) / unit == pytest.approx(10 + 24 / 8, rel=0.01)


@pytest.mark.parametrize("half", [False, True])
def test_activations_of_experts_as_pytorch_saves_them(half):
    config = replace(SMALL, mlp="swiglu", n_hidden=512, n_expert=4, n_active=2)
    found = case(Layout(), batch=5, model=config, gpus=1, dtype="bfloat16" if half else "float32")
    measured = saved_bytes(config, 5, half, autocast=False)
    assert sum(plan_formulas.saved_activations(found)) == pytest.approx(measured, rel=0.02)


def test_sequence_parallelism_divides_all_activations():
    whole, split = (plan_formulas.saved_activations(case(found, checkpointing=True)) for found in (Layout(), SP))
    assert [8 * part for part in split] == pytest.approx(whole)


def test_ulysses_saves_the_output_of_attention_twice(monkeypatch):
    """Before and after the exchange, as PyTorch does, here in a group of one process."""
    more = 8 * block_activations(case(SP)) - block_activations(case(Layout()))
    assert more == pytest.approx(2 * GPT3.block_size * GPT3.n_embd)

    def exchanging(model: GPT, seed: int) -> GPT:
        for module in model.modules():
            if isinstance(module, CausalSelfAttention):
                module.attend = partial(attend, dist.group.WORLD)
        return initialized(model, seed)

    whole = saved_bytes(SMALL, 1, half=False, autocast=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(test_plan, "initialized", exchanging)
        measured = saved_bytes(SMALL, 1, half=False, autocast=False) - whole
    finally:
        dist.destroy_process_group()
    assert measured == SMALL.n_layer * 4 * SMALL.block_size * SMALL.n_embd


def test_the_logits_are_divided_without_a_pipeline_only():
    logits = 2 * GPT3.block_size * GPT3.vocab_size  # bytes
    even = replace(GPT3, vocab_size=50304)
    layouts = Layout(), TP, replace(TP, pipeline=8)
    cases = (case(layout, model=even, nodes=8) for layout in layouts)
    whole, split, staged = (plan_formulas.saved_activations(found)[1] for found in cases)
    assert staged == whole and (whole - split) / logits == pytest.approx(7 / 8, rel=0.01)


def test_the_first_stage_holds_as_many_micro_batches_as_stages():
    """1F1B, arXiv:2104.04473, section 2.2.1: p of them, of L / p blocks each, as much as without a pipeline."""
    blocks = 12 * block_activations(case(PP))
    few, some, many = (case(PP, micro_steps=m).activations for m in (4, 8, 64))
    assert some - few == pytest.approx(4 * blocks) and many == some
    assert case(Layout(pipeline=1)).activations - some == pytest.approx(0, abs=0.1 * some)


def seconds_and_bytes(found: Candidate) -> list[tuple[float, float]]:
    return [(sent, seconds) for sent, seconds, _ in layout_transfers(found)]


def test_what_layouts_send():
    """GPT-3: 96 blocks, sequences of 2,048 tokens, 12,288 wide, in 2 bytes."""
    width = 2 * 2048 * 12288
    sent = lambda *of, **changed: sum(size for size, _ in seconds_and_bytes(case(*of, **changed)))  # noqa: E731
    assert sent(Layout()) == 0
    assert sent(TP) == pytest.approx(96 * 4 * 2 * 7 / 8 * width), "4 all-reduces in rings"
    assert sent(TP, checkpointing=True) == pytest.approx(96 * 6 * 2 * 7 / 8 * width), "forward's are repeated"
    assert sent(SP) == pytest.approx(96 * 2 * 4 * 7 / 8 * width / 8), (
        "q, k, v and the output, of an eighth of the tokens"
    )
    assert sent(PP, micro_steps=4) == pytest.approx(4 * 2 * width), "activations, gradients"
    assert sent(replace(PP, tensor=8), nodes=8) == pytest.approx(12 * 4 * 2 * 7 / 8 * width + 2 * width / 8)
    tokens = 2 * 64 * 256
    assert sent(EP, model=MOE, gpus=4) == pytest.approx(4 * 2 * 2 * 3 / 4 * 2 * tokens), (
        "2 of 4 experts, there and back"
    )
    assert sent(Layout(tensor=2), model=MOE, gpus=2) == pytest.approx(4 * 2 * 2 * 1 / 2 * tokens), "attention only"


def test_over_which_links():
    """Tensor parallelism inside a node; ranks of a node share its link to the others."""
    ((_, inside), *_), ((sent, between), *_) = (
        seconds_and_bytes(case(TP, gpus=gpus, nodes=8 // gpus)) for gpus in (8, 4)
    )
    assert sent / inside == pytest.approx(0.8 * 300e9) and sent / between == pytest.approx(0.8 * 50e9)
    sent, seconds = seconds_and_bytes(case(SP, gpus=4, nodes=2))[1]
    assert sent / seconds == pytest.approx(0.8 * 50e9 / 4)
    for gpus, senders in ((8, 8), (16, 8)):  # two nodes with a stage each; one stage of 8 ranks in each half of a node
        sent, seconds = seconds_and_bytes(case(Layout(pipeline=2), gpus=gpus, nodes=2 if gpus == 8 else 1))[3]
        expected = 0.8 * (50e9 / senders if gpus == 8 else 300e9)
        assert sent / seconds == pytest.approx(expected / 2), "one micro-step, and as long a bubble"
    (one, *_), (eight, *_) = (transfers(case(x, nodes=2), 0.0, 0.0) for x in (Layout(), TP))
    assert eight[1] / eight[0] == pytest.approx(8 * one[1] / one[0]), "8 rings, of the ranks with the same part"


def test_a_pipelines_bubble():
    """(p - 1) / m of the computing, arXiv:2104.04473, section 2.2."""
    few, many = (case(PP, micro_steps=m).computing / m for m in (14, 7 * 10**6))
    assert few / many == pytest.approx(1 + 7 / 14)


@pytest.mark.parametrize("model", [GPT3, SMALL, LLAMA, MOE], ids=["GPT-3", "GPT-2", "Llama", "experts"])
def test_work_is_divided(model):
    """Except for the logits in a pipeline, which the ranks of the last stage all compute."""
    total = model.flops_per_token()
    assert case(Layout(), model=model).part.flops == pytest.approx(total)
    logits = 6 * model.vocab_size * model.n_embd
    assert case(Layout(pipeline=2), model=model).part.flops == pytest.approx((total - logits) / 2 + logits)
    if model.vocab_size % 2 == 0:
        halves = Layout(tensor=2, expert=2 if model.n_expert else 1)
        assert case(halves, model=model).part.flops == pytest.approx(total / 2)


MEASURED = {  # on 2 ranks
    "tensor, ZeRO-1": (SMALL, Layout(tensor=2), "zero1"),
    "tensor, ZeRO-3, untied": (LLAMA, Layout(tensor=2), "zero3"),
    "pipeline": (LLAMA, Layout(pipeline=2), "zero1"),
    "experts, ZeRO-1": (MOE, Layout(expert=2), "zero1"),
    "experts, ZeRO-3": (MOE, Layout(expert=2), "zero3"),
    "sequence, ZeRO-2": (SMALL, Layout(sequence=2), "zero2"),
}


def measured(folder: Path, make_data: Any, model: GPTConfig, layout: Layout, strategy: str, what: str) -> list[Any]:
    """What tests.layout_state counts on each of two ranks: "state" or "saved"."""
    data = make_data(np.arange(5000) % model.vocab_size, model.vocab_size)
    settings: dict[str, Any] = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if hasattr(TrainConfig, field.name)
    }
    settings |= {f"{kind}_parallel": size for kind, size in vars(layout).items()}
    settings |= {
        "batch_size": 1,
        "max_iters": 2,
        "expert_balance": 0.0,
        "always_save_checkpoint": False,
        "gradient_accumulation_steps": 2,
    }
    given = {**TINY, **settings, "dataset": data, "out_dir": folder / "out", "deepspeed_config": zero_json(strategy)}
    done = run("-m", "tests.layout_state", str(folder), ranks=2, **given)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{what}_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("sequence", [1, 2])
def test_activations_of_long_sequences_as_counted_in_runs(sequence, tmp_path, make_data):
    """Sequences of 2,048 tokens: half as much on each of two ranks, and attention's output once more."""
    model, layout = GPTConfig(2048, 512, 2, 2, 64, bias=False), Layout(sequence=sequence)
    found = measured(tmp_path, make_data, model, layout, "zero2", "saved")
    predicted = case(layout, "zero2", model=model, gpus=2, dtype="float32")
    assert found == pytest.approx([sum(plan_formulas.saved_activations(predicted))] * 2, rel=0.001)


@pytest.mark.parametrize("name", MEASURED)
def test_model_states_as_counted_in_runs(name, tmp_path, make_data):
    model, layout, strategy = MEASURED[name]
    found = measured(tmp_path, make_data, model, layout, strategy, "state")
    predicted = case(layout, strategy, model=model, gpus=2, dtype="float32")
    state = predicted.part.state(strategy, torch.float32)
    for kind in ("parameters", "optimizer_states"):
        assert max(sizes[kind] for sizes in found) == pytest.approx(getattr(state, kind), rel=0.01), kind
    total = max(sum(sizes.values()) - sizes["buffers"] for sizes in found)  # with activations of a pipeline
    assert total == pytest.approx(predicted.model_state, rel=0.03) and predicted.model_state == state.total()


REFUSED = {
    "--model=gpt3-175b --tensor-parallel=3": "tensor_parallel = 3: must divide the number of ranks, 8, as 2 does",
    "--model=gpt2-xl --tensor-parallel=2": "n_kv_head = 25: must be divisible by tensor_parallel x",
    "--model=gpt2 --tensor-parallel=-1": "tensor_parallel = -1: must be above 0",
    "--model=gpt2 --tensor-parallel=0": "tensor_parallel = 0: must be above 0",
    "--model=gpt2 --tensor-parallel=0 --curve=table": "tensor_parallel = 0: must be above 0",
    "--model=gpt2 --pipeline-parallel=3 --curve=table": "pipeline_parallel = 3: must divide the number of ranks, 4",
    "--model=gpt2 --tensor-parallel=two": "tensor_parallel = 'two' (command line): must be a whole number (int)",
    "--model=gpt2 --gpus=2 --nodes=2 --tensor-parallel=4": "must divide the 2 ranks of a node; or set --tensor_across",
    "--model=gpt2 --expert-parallel=2": "expert_parallel = 2: needs a model with experts; set --n_expert",
    "--model=gpt2 --pipeline-parallel=2 --strategies=zero2": "pipeline_parallel = 2: needs ZeRO stage 1, stage is 2",
    "--model=gpt2 --pipeline-parallel=2 --strategies=fsdp": "pipeline_parallel = 2: needs ZeRO stage 1 or higher",
    "--model=gpt2 --tensor-parallel=2 --strategies=ddp": "tensor_parallel = 2: needs ZeRO stage 1 or higher",
    "--model=gpt2 --nodes=2 --pipeline-parallel=16 --strategies=zero1": "needs as many blocks, n_layer = 12",
    "--model=gpt2 --tensor-parallel=4 --global-batch=3": "must be divisible by the 2 data-parallel ranks; set 2",
    "config/train_shakespeare_char.py --tensor-parallel=2": "dropout = 0.2: must be 0 with tensor_parallel",
    "config/train_gpt2_moe.py --pipeline-parallel=2": "expert_balance = 0.01: must be 0 with pipeline_parallel",
    "config/train_gpt2_moe.py --expert-parallel=2 --tensor-parallel=2 --strategies=zero1": "needs ZeRO stage 3",
}


@pytest.mark.parametrize("words", REFUSED)
def test_an_impossible_layout_ends_in_one_message(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        asked = request(*words.split())
        (print_curve if asked.cfg.curve else print_report)(asked)
    assert REFUSED[words] in str(error.value)


def test_each_layout_has_the_strategies_that_train_it(monkeypatch):
    monkeypatch.chdir(ROOT)

    def names(*options: str) -> set[str]:
        return {
            found.strategy.name for found in request("config/train_gpt2.py", "--global_batch=64", *options).candidates()
        }

    assert names("--pipeline_parallel=2") == {"zero1"}
    assert names("--tensor_parallel=2") == {"zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme"}
    assert names("--sequence_parallel=2") == names() != names("--tensor_parallel=2")


def test_a_layout_of_a_recipe_or_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.py").write_text("tensor_parallel = 2\npipeline_parallel = 4\neval_iters = 7\n")
    found = request(
        "config/train_gpt2.py", f"{tmp_path}/mine.py", "--nodes=2", "--tensor_parallel=4", "--global_batch=64"
    )
    assert found.recipe.layout() == Layout(tensor=4, pipeline=4)
    taken = found.candidates()[0]
    assert taken.micro_steps * taken.batch == 64 and taken.sizes == "tp4 pp4"
    assert "--tensor_parallel=4" in command(found, taken)
    across = ("--tensor_parallel=4", "--tensor_across_nodes=True")
    assert request("--model=gpt2", "--gpus=2", "--nodes=2", *across).candidates()
    found = request("--model=gpt2", "--sequence_parallel=2", "--pipeline_parallel=2")
    lines = config_lines(found, found.candidates()[0])
    assert lines[-4:] == ["sequence_parallel = 2", "pipeline_parallel = 2", "compile = False", "eval_iters = 200"]
    assert f"gradient_accumulation_steps = {512 // found.candidates()[0].batch}  # all ranks together" in lines


SHAPES = {  # with the nodes of 8 GPUs
    "GPT-3 175B": (["--model=gpt3-175b", "--global_batch=1536"], 16),  # 3 million tokens, as in the paper
    "LLaMA 65B": (["config/train_llama2_65b.py"], 8),
    "Llama 2 70B": (["config/train_llama2_70b.py"], 8),
}


@pytest.mark.parametrize("name", SHAPES)
def test_large_models_get_a_sensible_layout(name, monkeypatch):
    """Stages across nodes, with what sends most inside a node; faster than every strategy without a layout."""
    monkeypatch.chdir(ROOT)
    words, nodes = SHAPES[name]
    asked = request(*words, f"--nodes={nodes}", "--vocab_size=32000", "--link=400")
    plain = [found for found in asked.candidates() if found.spare >= 0]
    taken = simplest(best_of_each(asked.candidates(search=True)))
    assert taken and taken.strategy.name == "zero1" and taken.spare > 0
    assert taken.layout.pipeline > 1 < taken.layout.tensor * taken.layout.sequence <= 8
    assert 0.35 < taken.mfu < 0.5 and taken.seconds < min(found.seconds for found in plain)
    assert (taken.layout.data(8 * nodes) * taken.micro_steps * taken.batch) == asked.global_batch


def test_what_fits_only_with_a_layout_gets_one_unasked():
    """70 billion parameters and sequences of 131,072 tokens: not even ZeRO-3 has room for one on a GPU."""
    words = (
        "config/train_llama2_70b.py",
        "--vocab-size=32000",
        "--block_size=131072",
        "--gradient_accumulation_steps=64",
    )
    done = run(
        "-m", "tools.plan", *words, "--nodes=8", "--device=H100", "--link=3200", "--strategies=zero1,zero2,zero3"
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^strategy +layout +batch", done.stdout, re.M)
    taken = re.search(r"\nTake (zero\d) (.*), the simplest", done.stdout)
    assert taken, done.stdout
    for short, size in re.findall(r"(.)p(\d+)", taken[2]):
        name = {"t": "tensor", "s": "sequence", "p": "pipeline"}[short]
        assert f"\n{name}_parallel = {size}\n" in done.stdout
    assert f"./launch_deepspeed_{taken[1]}.sh config/train_llama2_70b.py" in done.stdout
