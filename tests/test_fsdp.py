"""FSDP2 in all its forms: the loss of one process, exact resume, shards that go to other ranks and strategies."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import weights
from tests.running import TINY, difference, losses, message, run, train, zero_json
from training import model_state
from training.checkpoint import Checkpoints
from training.model_state import open_state

SETTINGS: dict[str, Any] = {"gradient_accumulation_steps": 4, "dropout": 0.1, "strategy": "fsdp", "bias": True}
FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "grad_op": {"reshard_after_forward": False, "activation_checkpointing": True},
    "hsdp": {"shard_ranks": 2},
    "offload": {"cpu_offload": True},
}


@pytest.fixture(scope="module")
def single(tmp_path_factory, data) -> Path:
    out = tmp_path_factory.mktemp("single")
    train(out, data, **{**SETTINGS, "strategy": "auto", "eval_interval": 15})
    return out


@pytest.mark.parametrize("form, ranks", [("full", 2), ("grad_op", 2), ("hsdp", 4), ("offload", 2)])
def test_every_form_trains_as_one_process(tmp_path, data, single, form, ranks):
    """Half of the way, with an evaluation and a save, and the other half by another start."""
    for until in (15, 30):
        settings = {**SETTINGS, **FORMS[form], "max_iters": until, "eval_interval": 15, "resume": "auto"}
        train(tmp_path, data, ranks=ranks, **settings)
    assert len(losses(single)) == 30 and losses(single)[29] < losses(single)[0] - 0.3, "it learns nothing"
    assert difference(single, tmp_path) <= 1e-5 and difference(single, tmp_path, "grad_norm") <= 1e-5
    newest, about = Checkpoints(str(tmp_path)).newest()
    assert (about["strategy"], about["world_size"]) == ("fsdp", ranks)
    assert len(list(newest.glob("shard_*.pt"))) == 2, "a copy too many, or none"
    ours, theirs = open_state(newest, about), open_state(*Checkpoints(str(single)).newest())
    assert ours.shapes == theirs.shapes
    for name, weight in weights(theirs).items():
        torch.testing.assert_close(ours.whole(name), weight, rtol=0, atol=1e-5)


def test_shards_go_to_other_ranks_and_strategies(tmp_path, data, single):
    """(strategy, ranks) in turn, each from what the one before it has written; some ranks own nothing of a bias."""
    folder, shown = tmp_path / "out", {key: SETTINGS[key] for key in SETTINGS if key != "strategy"}
    chain = [("full", 2), ("full", 4), ("zero2", 2), ("offload", 0), ("zero3", 2), ("hsdp", 4), ("auto", 0)]
    for number, (strategy, ranks) in enumerate(chain, 1):
        own: dict[str, Any] = {"deepspeed_config": zero_json(strategy)} if "zero" in strategy else {"strategy": "fsdp"}
        own |= FORMS.get(strategy, {} if "zero" in strategy else {"strategy": strategy})
        until = 30 if number == len(chain) else 4 * number
        train(folder, data, ranks=ranks, **{**shown, **own, "max_iters": until, "resume": "auto"})
    assert len(losses(folder)) == 30
    assert difference(single, folder) <= 1e-5 and difference(single, folder, "grad_norm") <= 1e-5


def test_bf16_stays_near_ddp(tmp_path, data):
    """FSDP2 holds the gathered weights and all activations in bf16, autocast what matmuls touch."""
    ddp, fsdp = tmp_path / "ddp", tmp_path / "fsdp"
    settings = {**SETTINGS, "dtype": "bfloat16", "max_iters": 15}
    train(ddp, data, ranks=2, **{**settings, "strategy": "auto"})
    train(fsdp, data, ranks=2, **settings)
    assert 0 < difference(ddp, fsdp) < 0.02
    newest = Checkpoints(str(fsdp)).intact()[-1] / "shard_0000.pt"
    assert {tensor.dtype for tensor in model_state.read_torch_file(newest)["weight"].values()} == {torch.float32}


def test_what_fsdp_cannot_do_is_said(tmp_path, data):
    wrong = {"strategy": "fdsp", "shard_ranks": 3}
    told = message(run("train.py", ranks=2, **{**TINY, "dataset": data, "out_dir": tmp_path, **wrong}))
    assert "strategy = 'fdsp' (command line): must be one of auto, ddp, fsdp" in told
    assert "shard_ranks = 3 (command line): must divide the number of ranks, 2: 0, or one of [1, 2]" in told
    told = message(run("train.py", **{**TINY, "dataset": data, "out_dir": tmp_path, "cpu_offload": True}))
    assert (
        "cpu_offload = True (command line): applies to FSDP only, and strategy is 'auto'; set --strategy=fsdp" in told
    )
