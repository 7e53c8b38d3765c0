"""Tensor, pipeline, sequence and expert parallelism: the losses of one process, whatever layout goes on from which."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.running import difference, losses, rows, train, zero_json
from training.checkpoint import Checkpoints, read_metadata
from training.config import parse
from training.deepspeed_config import DeepSpeedTrainConfig
from training.deepspeed_parallel import check
from training.distributed import SINGLE_PROCESS, Layout
from training.errors import ConfigError
from training.model_state import open_state

SHAPE = {"n_layer": 4, "n_head": 8, "n_embd": 32}
RUN: dict[str, Any] = {"gradient_accumulation_steps": 4, "lr_decay_iters": 30, "log_interval": 1, **SHAPE}
LLAMA: dict[str, Any] = {
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "n_hidden": 48,
    "n_kv_head": 4,
    "rope_theta": 1e4,
    "tied": False,
}
LLAMA |= {"qk_norm": True, "tied": False}
# 3 steps each, from what the one before it has written: (ranks, ZeRO stage or "" for train.py, layout)
DENSE = [
    *[(0, "", {}), (2, "2_offload", {"tensor": 2}), (4, "1", {"pipeline": 2, "tensor": 2}), (2, "", {"sequence": 2})],
    *[(4, "3", {"tensor": 2}), (2, "1", {"pipeline": 2}), (4, "2", {"tensor": 2, "sequence": 2}), (2, "3", {})],
]
EXPERTS = [
    *[(0, "", {}), (4, "1", {"expert": 2}), (2, "3", {"expert": 2}), (2, "", {})],
    *[(4, "3", {"expert": 2, "tensor": 2}), (4, "1", {"expert": 2, "pipeline": 2}), (2, "2", {"expert": 2})],
]


def part(folder: Path, data: Path, ranks: int, stage: str, layout: dict[str, int], until: int, **settings: Any) -> str:
    given = {**RUN, **{f"{name}_parallel": size for name, size in layout.items()}, **settings}
    given |= {"deepspeed_config": zero_json(f"zero{stage}")} if stage else {}
    return train(folder, data, ranks=ranks, max_iters=until, resume="auto", **given)


@pytest.mark.parametrize(
    "chain, model",
    [(DENSE, {"bias": True}), (EXPERTS, {**LLAMA, "n_expert": 4, "expert_balance": 0.0})],
    ids=["gpt2", "experts"],
)
def test_any_layout_goes_on_from_any_other(tmp_path, data, chain, model):
    whole, folder = tmp_path / "whole", tmp_path / "chain"
    train(whole, data, **{**RUN, **model, "max_iters": 3 * len(chain)})
    for number, (ranks, stage, layout) in enumerate(chain, 1):
        output = part(folder, data, ranks, stage, layout, until=3 * number, **model)
        assert number == 1 or f"resuming {folder}/checkpoints/step_{3 * number - 3:06d}" in output
        assert read_metadata(Checkpoints(str(folder)).newest()[0])["layout"] == vars(Layout(**layout))
    assert len(losses(folder)) == 3 * len(chain)
    assert difference(whole, folder) <= 1e-5 and difference(whole, folder, "grad_norm") <= 1e-5


SWIGLU = "--mlp=swiglu --bias=False --n_expert=4 --expert_balance=0.0"
REFUSED = {  # on 4 ranks
    "--tensor_parallel=3": "must divide the number of ranks, 4, as 2 does",
    "--tensor_parallel=0": "must be above 0",
    "--tensor_parallel=4 --pipeline_parallel=2": "tensor_parallel x pipeline_parallel = 8 must divide the number",
    "--tensor_parallel=4 --n_head=6 --n_embd=384": "must be divisible by tensor_parallel x sequence_parallel = 4",
    "--sequence_parallel=2 --n_kv_head=1": "must be divisible by tensor_parallel x sequence_parallel = 2",
    "--sequence_parallel=2 --block_size=33": "must be divisible by sequence_parallel = 2",
    "--pipeline_parallel=2 --dropout=0.1": "must be 0 with pipeline_parallel: ranks that share a sequence would draw",
    "--expert_parallel=2": "needs a model with experts; set --n_expert",
    f"--expert_parallel=4 {SWIGLU} --n_expert=6": "must divide n_expert = 6",
    f"--expert_parallel=4 --pipeline_parallel=2 {SWIGLU}": "must divide the 2 ranks of a pipeline stage",
    f"--pipeline_parallel=2 {SWIGLU} --expert_balance=0.01": "must be 0 with pipeline_parallel: a rank has a part",
    f"--sequence_parallel=2 {SWIGLU} --expert_balance=0.01": "must be 0 with sequence_parallel: a rank has a part",
    "--n_expert=4": "experts are SwiGLU MLPs without biases; set --mlp=swiglu --bias=False",
    "--pipeline_parallel=2 --compile=True": "must be False with experts",
    f"{SWIGLU} --compile=True": "must be False with experts",
    f"{SWIGLU} --n_active=5": "must be at most n_expert = 4",
    f"{SWIGLU} --optimizer=muon": "experts are stacks of matrices, which Muon does not know; set --optimizer=adamw",
}
REFUSED_BY_STRATEGY = [  # also on 4 ranks
    ("--tensor_parallel=2", "zero0", "tensor_parallel = 2: needs ZeRO stage 1 or higher"),
    ("--pipeline_parallel=2", "zero2", "pipeline_parallel = 2: needs ZeRO stage 1, stage is 2"),
    ("--pipeline_parallel=4 --n_layer=3", "zero1", "pipeline_parallel = 4: needs as many blocks, n_layer = 3"),
    ("--pipeline_parallel=2 --eval_iters=3", "zero1", "eval_iters = 3: with pipeline_parallel = 2, must be divisible"),
    ("--tensor_parallel=2 --optimizer=muon", "zero1", "tensor_parallel = 2: Muon needs whole matrices"),
    (
        f"--expert_parallel=2 --tensor_parallel=2 {SWIGLU}",
        "zero2",
        "expert_parallel = 2: with tensor_parallel, needs ZeRO stage 3",
    ),
    (f"--expert_parallel=2 {SWIGLU}", "zero3_nvme", "expert_parallel = 2: DeepSpeed cannot save experts from NVMe"),
    ("--tensor_parallel=2", "zero3_hpz", "zero_hpz_partition_size: not with tensor or expert parallelism"),
]


@pytest.fixture
def four_ranks(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)


def settings(words: str) -> DeepSpeedTrainConfig:
    return parse(DeepSpeedTrainConfig, ["--dropout=0.0", "--compile=False", *words.split()], "")


@pytest.mark.parametrize("words", REFUSED)
def test_a_layout_that_cannot_be_is_refused(four_ranks, words):
    with pytest.raises(ConfigError) as refusal:
        settings(words)
    assert str(refusal.value).startswith("1 problem") and REFUSED[words] in str(refusal.value)


def test_matrices_are_not_shared_across_nodes_unless_asked_for(four_ranks, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    settings("--tensor_parallel=2")
    with pytest.raises(ConfigError) as refusal:
        settings("--tensor_parallel=4")
    assert "tensor_parallel = 4 (command line): must divide the 2 ranks of a node" in str(refusal.value)
    settings("--tensor_parallel=4 --tensor_across_nodes=True")


def test_ranks_are_named_by_their_place():
    """Tensor innermost, then sequence, data, and pipeline outermost."""
    ranks = replace(SINGLE_PROCESS, world_size=16, layout=Layout(tensor=2, sequence=2, pipeline=2))
    assert ranks.names([13]) == "rank 13 (pipeline 1, data 1, sequence 0, tensor 1)"
    ranks = replace(ranks, world_size=8)
    assert ranks.names([0, 5]) == "rank 0 (pipeline 0, sequence 0, tensor 0), rank 5 (pipeline 1, sequence 0, tensor 1)"
    assert replace(ranks, layout=Layout()).names([0, 5]) == "ranks 0, 5"


@pytest.mark.parametrize("words, strategy, expected", REFUSED_BY_STRATEGY)
def test_a_layout_that_deepspeed_would_train_wrongly_is_refused(four_ranks, words, strategy, expected):
    cfg = settings(words)
    ranks = replace(SINGLE_PROCESS, world_size=4, layout=cfg.layout())
    (problem,) = check(cfg, ranks, cfg.model_config(257), strategy)
    assert problem.startswith(expected)


@pytest.mark.parametrize("model", [{"bias": True}, LLAMA], ids=["tied", "untied"])
def test_ranks_share_the_vocabulary_where_it_divides(tmp_path, make_data, model):
    """Embedding, logits and loss: each rank has a part of the ids."""
    data = make_data(np.random.default_rng(0).zipf(1.5, 4000) % 64, 64)
    single, split, settings = tmp_path / "single", tmp_path / "split", {**RUN, **model, "max_iters": 8}
    train(single, data, **settings)
    train(split, data, ranks=2, **settings, tensor_parallel=2, deepspeed_config=zero_json("zero1"))
    assert open_state(*Checkpoints(str(split)).newest()).shapes["transformer.wte.weight"][0] == 64
    assert difference(single, split) <= 1e-5 and difference(single, split, "grad_norm") <= 1e-5


def test_the_balance_of_experts_is_the_mean_over_the_ranks(tmp_path, data):
    """Each rank counts the tokens of its own sequences; the sum over them, in one process, is the whole batch."""
    settings = {**RUN, **LLAMA, "n_expert": 4, "max_iters": 6}
    train(tmp_path / "single", data, **settings)
    train(tmp_path / "split", data, ranks=2, **settings, expert_parallel=2, deepspeed_config=zero_json("zero1"))
    assert difference(tmp_path / "single", tmp_path / "split", "expert_balance") <= 1e-5
    assert 1 < min(row["expert_balance"] for row in rows(tmp_path / "split", "train")) < 4
