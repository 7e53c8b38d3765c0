"""Muon: orthogonal updates, the same losses under every strategy, and resuming across strategies."""

import shutil

import pytest
import torch

from model import GPT
from tests.checkpoints import SMALL, initialized
from tests.running import difference, losses, refused, strategy_settings, train, zero_json
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.model_state import open_state
from training.muon import orthogonalize
from training.optim import make_optimizer

MUON: dict = {"optimizer": "muon", "grad_clip": 0.0, "gradient_accumulation_steps": 6, "lr_decay_iters": 30}
STRATEGIES = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 128)])
def test_singular_values_of_an_update_are_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(orthogonalize(matrix), full_matrices=False)
    scale = max(1, shape[0] / shape[1]) ** 0.5
    assert s.min() / scale > 0.6 and s.max() / scale < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(left.abs(), u.abs(), atol=0.1) or torch.linalg.matrix_norm(left @ right - u @ v, 2) < 0.1


def test_only_matrices_inside_the_blocks_are_muons():

    model = initialized(GPT(SMALL), 0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon", learning_rate=1e-3, muon_lr=0.01, weight_decay=0.0))
    tokens = torch.randint(SMALL.vocab_size, (2, SMALL.block_size))
    model(tokens, tokens.roll(1)).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        state, change = optimizer.state[parameter], parameter.detach() - before[name]
        if ".h." in name and parameter.dim() == 2:
            assert list(state) == ["momentum_buffer"], name
            scale = 0.01 * max(1, parameter.size(0) / parameter.size(1)) ** 0.5
            assert 0.3 * scale < torch.linalg.matrix_norm(change, 2) < 1.3 * scale, name
        else:
            assert set(state) == {"step", "exp_avg", "exp_avg_sq"}, name
            assert change.abs().max() < 1.01e-3, name


@pytest.fixture(scope="module")
def single(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("single")
    train(folder, data, **MUON)
    return folder


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_as_one_process(tmp_path, data, single, strategy, ranks):
    """On 3 ranks the shards of a matrix have different numbers of rows."""
    train(tmp_path / "run", data, ranks=ranks, **{**MUON, **strategy_settings(strategy, tmp_path)})
    assert difference(tmp_path / "run", single) < 1e-5
    assert losses(single)[29] < losses(single)[0] - 0.5


@pytest.fixture(scope="module")
def halves(tmp_path_factory, data):
    """Runs of 15 steps, by strategy."""
    folder = tmp_path_factory.mktemp("halves")
    for strategy in ("single", "fsdp", "zero1", "zero3"):
        settings = {} if strategy == "single" else strategy_settings(strategy, folder)
        train(folder / strategy, data, ranks=0 if strategy == "single" else 2, **{**MUON, "max_iters": 15, **settings})
    return folder


@pytest.mark.parametrize(
    "first, then, ranks",
    [("single", "zero1", 3), ("zero1", "zero3", 2), ("zero3", "fsdp", 3), ("fsdp", "single", 0), ("zero1", "ddp", 2)],
)
def test_its_momentum_goes_on_under_another_strategy(tmp_path, data, halves, single, first, then, ranks):
    shutil.copytree(halves / first, tmp_path / "run")
    settings = {} if then == "single" else strategy_settings(then, tmp_path)
    train(tmp_path / "run", data, ranks=ranks, **{**MUON, "init_from": "resume", **settings})
    assert difference(tmp_path / "run", single) < 1e-5


@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero3"])
def test_a_checkpoint_has_the_momentum_of_every_matrix(halves, strategy):
    state, expected = (open_state(*Checkpoints(str(halves / name)).newest()) for name in (strategy, "single"))
    matrices = [name for name, kind in expected.pieces if kind == "momentum_buffer"]
    assert len(matrices) == 4 * 2
    for name in matrices:
        momentum = expected.whole(name, "momentum_buffer")
        assert momentum.norm() > 0 and state.kinds_of(name) == ("momentum_buffer",)
        torch.testing.assert_close(state.whole(name, "momentum_buffer"), momentum, rtol=1e-4, atol=1e-6)


def test_what_deepspeed_would_get_wrong_is_refused(tmp_path, data):
    told = refused(tmp_path, data, optimizer="muon", deepspeed_config=zero_json("zero2_offload"))
    assert "grad_clip = 1.0: with optimizer = muon, DeepSpeed would clip the update; set --grad_clip=0" in told
    assert "nothing can be offloaded; use --optimizer=adamw" in told


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path, data, halves):
    shutil.copytree(halves / "single", tmp_path / "run")
    told = refused(tmp_path / "run", data, **{**MUON, "optimizer": "adamw", "init_from": "resume"})
    assert "holds the state of muon, but optimizer = 'adamw'; resume with --optimizer=muon" in told
