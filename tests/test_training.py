"""The shared nouns: batches, optimizer, evaluation, devices, the scaler in a checkpoint."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import DataError
from model import GPT
from tests.running import TINY, run
from train import Trainer
from training import devices, run_folder
from training.batches import Batches
from training.config import parse
from training.distributed import ALONE
from training.evaluation import evaluate
from training.optim import adamw, learning_rate
from training.origin import Origin
from training.train_config import TrainConfig


def config(data: Path, **settings) -> TrainConfig:
    return parse(TrainConfig, [f"--{k}={v}" for k, v in {**TINY, "dataset": data, **settings}.items()], "")


def global_batch(cfg: TrainConfig, world_size: int, step: int) -> torch.Tensor:
    """The tokens of a step in the order of its micro-batches, gathered from all ranks."""
    parts = {}
    for rank in range(world_size):
        batches = Batches(cfg, replace(ALONE, rank=rank, world_size=world_size))
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
    assert not torch.equal(global_batch(cfg, 1, 0), global_batch(cfg, 1, 7))
    assert not torch.equal(global_batch(replace(cfg, seed=1), 1, 7), global_batch(cfg, 1, 7))


def test_every_place_of_the_text_can_be_drawn(make_data):
    """The last sequence too, whose last target is the last token."""
    folder = make_data(np.arange(40), vocab_size=40)
    batches = Batches(config(folder, batch_size=200), ALONE)
    tokens, targets = batches.train(0, 0)
    assert set(tokens[:, 0].tolist()) == set(range(8)) and targets.max() == 39


def test_evaluation_has_its_own_batches_and_always_the_same(data):
    batches = Batches(config(data), ALONE)
    before = batches.evaluation("val", 3)[0]
    batches.train(5, 0)
    assert torch.equal(batches.evaluation("val", 3)[0], before)
    assert not torch.equal(batches.evaluation("val", 4)[0], before)


@pytest.mark.parametrize("count", [1, 4, 5])
def test_evaluation_is_the_mean_over_count_batches_on_any_number_of_ranks(data, count):
    cfg = config(data)

    def loss_of(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return tokens.double().mean()

    expected = evaluate(loss_of, Batches(cfg, ALONE), ALONE, count)
    for ranks in (2, 3):
        passes: list[int] = []
        sums: list[torch.Tensor] = []

        class Rank:  # collects what the ranks would add up
            def __init__(self, rank: int, ranks: int, sums: list):
                self.rank, self.world_size, self.device, self.sums = rank, ranks, torch.device("cpu"), sums

            def mean(self, value: torch.Tensor) -> torch.Tensor:
                self.sums.append(value)
                return value / self.world_size

        for rank in range(ranks):
            calls = [0]

            def counted(tokens: torch.Tensor, targets: torch.Tensor, calls: list = calls) -> torch.Tensor:
                calls[0] += 1
                return loss_of(tokens, targets)

            me = Rank(rank, ranks, sums)
            evaluate(counted, Batches(cfg, replace(ALONE, rank=rank, world_size=ranks)), me, count)  # type: ignore[arg-type]
            passes.append(calls[0])
        assert len(set(passes)) == 1, "a rank takes more forward passes than another and would wait for it"
        train, val = (sum(sums) / count).tolist()
        assert math.isclose(train, expected["train_loss"], rel_tol=1e-6)
        assert math.isclose(val, expected["val_loss"], rel_tol=1e-6)


def test_ids_beyond_the_vocabulary_and_texts_that_are_too_short(make_data, tmp_path):
    folder = make_data(np.full(100, 60), vocab_size=50)
    told = run("train.py", **{**TINY, "dataset": folder, "out_dir": tmp_path / "out"})
    assert told.returncode == 2
    assert f"error: {folder}/train.bin holds id 60, beyond its vocabulary of 50" in told.stderr
    with pytest.raises(DataError, match="has 100 tokens: too few for block_size = 100, which needs one more"):
        Batches(config(folder, block_size=100), ALONE)


def test_a_bin_that_shrinks_while_it_is_read(make_data):
    folder = make_data(np.arange(50), vocab_size=50)
    batches = Batches(config(folder), ALONE)
    (folder / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match="became shorter while it was read"):
        batches.train(0, 0)


def test_the_optimizer_decays_matrices_once_and_is_adamw(data):
    cfg = config(data, weight_decay=0.3)
    model = GPT(cfg.model_config(257)).init_weights(0)
    optimizer = adamw(model, cfg)
    groups = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert [p.dim() for p in groups[0.3]] == [2] * len(groups[0.3]) and {p.dim() for p in groups[0.0]} == {1}
    assert sorted(map(id, groups[0.3] + groups[0.0])) == sorted(map(id, model.parameters()))

    theirs = GPT(cfg.model_config(257)).init_weights(0)
    decay, rest = ([p for p in theirs.parameters() if (p.dim() == 2) == matrix] for matrix in (True, False))
    plain = [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(plain, lr=cfg.learning_rate, betas=(0.9, 0.95), foreach=False)
    tokens, targets = Batches(cfg, ALONE).train(0, 0)
    for _ in range(3):
        for network, steps in ((model, optimizer), (theirs, reference)):
            network(tokens, targets).backward()
            steps.step()
            steps.zero_grad()
    for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_is_nanogpts(data):
    cfg = config(data, learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    found = [learning_rate(cfg, step) for step in (0, 9, 10, 60, 110, 5000)]
    assert found == pytest.approx([1 / 11, 10 / 11, 1.0, 0.55, 0.1, 0.1])
    assert learning_rate(replace(cfg, decay_lr=False), 0) == 1.0


def test_the_scaler_of_fp16_is_in_the_checkpoint(data, tmp_path):
    cfg = config(data, dtype="float16")
    first = Trainer(cfg, ALONE, Batches(cfg, ALONE), Origin(cfg.model_config(257)), torch.float16)
    first.scaler.load_state_dict({**first.scaler.state_dict(), "scale": 1024.0})
    for step in range(3):
        first.train_step(step, 1e-3)
    first.save(tmp_path)
    second = Trainer(cfg, ALONE, first.batches, Origin(cfg.model_config(257), checkpoint=tmp_path), torch.float16)
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert second.scaler.get_scale() == 1024.0 and second.scaler.state_dict()["_growth_tracker"] == 3
    one, other = (trainer.train_step(3, 1e-3)[0] for trainer in (first, second))
    assert torch.equal(one, other)


def test_peaks_are_those_of_the_name_and_none_is_guessed(monkeypatch):
    names = list(devices.PEAK_TFLOPS)
    for i, name in enumerate(names):
        hidden = [before for before in names[:i] if before in name]
        assert not hidden, f"{name} is never found: {hidden} match first"
    assert devices.peak_flops(torch.device("cpu"), torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GT 710")
    assert devices.peak_flops(torch.device("cuda"), torch.float32) is None


def test_a_run_that_is_moved_aside_is_moved_whole(tmp_path):
    for name in (*run_folder.CONTENTS, "notes.txt"):
        if name == "checkpoints":
            (tmp_path / name / "step_000001").mkdir(parents=True)
        else:
            (tmp_path / name).write_text(name)
    run_folder.move_aside(tmp_path)
    (previous,) = (tmp_path / "previous").iterdir()
    assert {path.name for path in previous.iterdir()} == set(run_folder.CONTENTS)
    assert {path.name for path in tmp_path.iterdir()} == {"previous", "notes.txt"}
