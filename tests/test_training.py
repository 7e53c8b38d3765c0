"""The shared nouns: batches, optimizer, evaluation, devices, the scaler in a checkpoint."""

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.errors import DataError
from model import GPT
from tests.checkpoints import initialized
from tests.running import TINY, run
from train import Trainer
from training import run_folder
from training.batches import Batches
from training.checkpoint import CheckpointWriter
from training.config import PlainTrainConfig, parse
from training.distributed import SINGLE_PROCESS, Ranks
from training.init import InitState
from training.loop import evaluate
from training.optim import learning_rate, make_optimizer, set_learning_rate


def config(data: Path, **settings) -> PlainTrainConfig:
    return parse(PlainTrainConfig, [f"--{k}={v}" for k, v in {**TINY, "dataset": data, **settings}.items()], "")


def global_batch(cfg: PlainTrainConfig, world_size: int, step: int) -> torch.Tensor:
    """The tokens of a step in the order of its micro-batches, gathered from all ranks."""
    parts = {}
    for rank in range(world_size):
        batches = Batches(cfg, replace(SINGLE_PROCESS, rank=rank, world_size=world_size))
        for micro_step in range(batches.micro_steps):
            tokens, targets = batches.train(step, micro_step)
            assert torch.equal(tokens[:, 1:], targets[:, :-1])
            parts[batches.micro_batch(micro_step)] = tokens
    return torch.cat([parts[i] for i in range(len(parts))])


def test_the_global_batch_does_not_depend_on_the_ranks(data):
    cfg = config(data, gradient_accumulation_steps=4)
    for step in (0, 7):
        one = global_batch(cfg, 1, step)
        assert one.shape == (16, 32)
        assert all(torch.equal(global_batch(cfg, ranks, step), one) for ranks in (2, 4))
    assert not torch.equal(global_batch(replace(cfg, seed=1), 1, 7), one)
    batches = Batches(cfg, SINGLE_PROCESS)
    assert torch.equal(batches.train(0, 0)[0], global_batch(cfg, 1, 0)[:4])
    assert torch.equal(batches.train(7, 0)[0], one[:4]), "the batches of a step depend on the step before"


def test_dropout_belongs_to_the_micro_batch_whichever_rank_has_it(data):
    cfg = config(data, gradient_accumulation_steps=4)
    first, second, *_ = (Batches(cfg, replace(SINGLE_PROCESS, rank=rank, world_size=2)) for rank in range(2))
    seeds = [ranks.dropout_seed(step, micro) for step in (0, 1) for micro in (0, 1) for ranks in (first, second)]
    assert seeds == [Batches(cfg, SINGLE_PROCESS).dropout_seed(step, micro) for step in (0, 1) for micro in range(4)]
    assert len(set(seeds)) == 8


def test_every_place_of_the_text_can_be_drawn(make_data):
    """The last sequence too, whose last target is the last token."""
    folder = make_data(np.arange(40), vocab_size=40)
    batches = Batches(config(folder, batch_size=200), SINGLE_PROCESS)
    tokens, targets = batches.train(0, 0)
    assert set(tokens[:, 0].tolist()) == set(range(8)) and targets.max() == 39


def test_evaluation_has_its_own_batches_and_always_the_same(data):
    batches = Batches(config(data), SINGLE_PROCESS)
    before = batches.evaluation("val", 3)[0]
    training = batches.train(5, 0)[0]
    assert torch.equal(batches.evaluation("val", 3)[0], before)
    assert not torch.equal(batches.evaluation("val", 4)[0], before)
    assert not torch.equal(batches.evaluation("train", 5)[0], training)
    for split in ("train", "val"):
        text = (data / f"{split}.bin").read_bytes()
        assert all(row.numpy().astype("<u2").tobytes() in text for row in batches.evaluation(split, 0)[0])


class Share(Ranks):
    """A rank that knows its own sums only: the test adds them up."""

    def share(self, value: Any) -> list[Any]:
        return [value]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_evaluation_is_the_mean_over_count_batches_on_any_number_of_ranks(data, count, ranks):
    cfg, passes = config(data), []

    def loss_of(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        passes.append(1)
        return tokens.double().mean()

    trainer: Any = SimpleNamespace(loss=loss_of)
    expected = evaluate(trainer, Batches(cfg, SINGLE_PROCESS), count, lambda: False)
    found = dict.fromkeys(expected, 0.0)
    for rank in range(ranks):
        passes.clear()
        me = Share(rank, rank, ranks, SINGLE_PROCESS.device)
        for split, loss in evaluate(trainer, Batches(cfg, me), count, lambda: False).items():
            found[split] += loss
        assert len(passes) == 2 * math.ceil(count / ranks), "a rank with fewer passes than another would wait for it"
    assert found == pytest.approx(expected, rel=1e-6)


def test_only_rank_0_shows_progress_and_only_on_a_terminal(capsys, monkeypatch):
    for rank, is_terminal in ((0, False), (1, True), (0, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        assert list(replace(SINGLE_PROCESS, rank=rank).progress(range(3), "evaluating")) == [0, 1, 2]
        assert ("evaluating: " in capsys.readouterr().err) == (rank == 0 and is_terminal)


def test_ids_beyond_the_vocabulary_and_texts_that_are_too_short(make_data, tmp_path):
    folder = make_data(np.full(100, 50), vocab_size=50)
    told = run("train.py", **{**TINY, "dataset": folder, "out_dir": tmp_path / "out"})
    assert told.returncode == 2
    assert f"error: {folder}/train.bin contains id 50, outside its vocabulary of 50" in told.stderr
    with pytest.raises(DataError, match="has 100 tokens: too few for block_size = 100, which needs one more"):
        Batches(config(folder, block_size=100), SINGLE_PROCESS)
    with pytest.raises(DataError, match="contains id 50"):
        Batches(config(folder), SINGLE_PROCESS)
    ids = np.zeros(2**20, int)
    ids[2**15 : 2**15 + 2**14] = 70  # where the first look, at 16 places, does not come
    large = Batches(config(make_data(ids, 50, "large"), batch_size=500), SINGLE_PROCESS)
    with pytest.raises(DataError, match="contains id 70"):
        large.evaluation("val", 0)


def test_a_bin_that_shrinks_while_it_is_read(make_data):
    folder = make_data(np.arange(50), vocab_size=50)
    batches = Batches(config(folder), SINGLE_PROCESS)
    (folder / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match="became shorter while it was being read"):
        batches.train(0, 0)


def test_the_optimizer_decays_matrices_once_and_is_adamw(data):
    cfg = config(data, weight_decay=0.3, beta1=0.8)
    model = initialized(GPT(cfg.model_config(257)), 0)
    optimizer = make_optimizer(model, cfg)
    groups = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert [p.dim() for p in groups[0.3]] == [2] * len(groups[0.3]) and {p.dim() for p in groups[0.0]} == {1}
    assert sorted(map(id, groups[0.3] + groups[0.0])) == sorted(map(id, model.parameters()))

    theirs = initialized(GPT(cfg.model_config(257)), 0)
    decay, rest = ([p for p in theirs.parameters() if (p.dim() == 2) == matrix] for matrix in (True, False))
    plain = [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(plain, lr=cfg.learning_rate, betas=(0.8, 0.95), foreach=False)
    tokens, targets = Batches(cfg, SINGLE_PROCESS).train(0, 0)
    for _ in range(3):
        for network, steps in ((model, optimizer), (theirs, reference)):
            network(tokens, targets).backward()
            steps.step()
            steps.zero_grad()
    for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert set_learning_rate(optimizer, replace(cfg, learning_rate=0.25, decay_lr=False), 0) == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_the_learning_rate_is_nanogpts(data):
    cfg = config(data, learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    found = [learning_rate(cfg, step) for step in (0, 9, 10, 60, 110, 5000)]
    assert found == pytest.approx([1 / 11, 10 / 11, 1.0, 0.55, 0.1, 0.1])
    assert learning_rate(replace(cfg, decay_lr=False), 0) == 1.0


def test_the_scaler_of_fp16_is_in_the_checkpoint(data, tmp_path):
    cfg = config(data, dtype="float16")
    first = Trainer(cfg, SINGLE_PROCESS, Batches(cfg, SINGLE_PROCESS), InitState(cfg.model_config(257)), torch.float16)
    first.scaler.load_state_dict({**first.scaler.state_dict(), "scale": 1024.0})
    for step in range(3):
        first.train_step(step)
    writer = CheckpointWriter(tmp_path, background=False)
    first.save(writer)
    writer.finish()
    files = {"model.pt": 0, "optimizer.pt": 0}
    about = {"strategy": "single", "world_size": 1, "model": asdict(cfg.model_config(257)), "files": files}
    (tmp_path / "checkpoint.json").write_text(json.dumps(about))
    second = Trainer(
        cfg, SINGLE_PROCESS, first.batches, InitState(cfg.model_config(257), checkpoint=tmp_path), torch.float16
    )
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert second.scaler.get_scale() == 1024.0 and second.scaler.state_dict()["_growth_tracker"] == 3
    one, other = (trainer.train_step(3)["loss"] for trainer in (first, second))
    assert torch.equal(one, other)


def test_a_run_that_is_moved_aside_is_moved_whole(tmp_path):
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    for name in {*run_folder.CONTENTS, "notes.txt"} - {"checkpoints"}:
        (tmp_path / name).write_text(name)
    run_folder.move_aside(tmp_path)
    (previous,) = (tmp_path / "previous").iterdir()
    assert {path.name for path in previous.iterdir()} == set(run_folder.CONTENTS)
    assert {path.name for path in tmp_path.iterdir()} == {"previous", "notes.txt"}
