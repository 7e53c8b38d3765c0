"""A run that goes on under another strategy, on another number of ranks: the loss curve does not show it."""

from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import weights
from tests.running import difference, losses, strategy_settings, train
from training.checkpoint import Checkpoints, read_metadata
from training.model_state import open_state

SETTINGS: dict[str, Any] = {"gradient_accumulation_steps": 4, "lr_decay_iters": 30, "log_interval": 1}
# 30 steps in 10 parts: (strategy, ranks), each from what the one before it has written
CHAIN = [
    *[("single", 0), ("zero1", 2), ("zero2", 4), ("zero3", 2), ("zero3_offload", 2), ("zero3", 0)],
    *[("ddp", 2), ("zero3_nvme", 2), ("zero2_offload", 2), ("zero0", 2)],
]


def part(folder: Path, data: Path, strategy: str, ranks: int, until: int, **settings) -> str:
    given = {**SETTINGS, "max_iters": until, "resume": "auto", **strategy_settings(strategy, folder.parent)}
    return train(folder, data, ranks=ranks, **{**given, **settings})


def test_a_run_goes_through_all_strategies_and_back(tmp_path, data):
    whole, folder = tmp_path / "whole", tmp_path / "chain"
    train(whole, data, **SETTINGS)
    for number, (strategy, ranks) in enumerate(CHAIN, 1):
        output = part(folder, data, strategy, ranks, until=3 * number)
        assert number == 1 or f"read step_{3 * number - 3:06d} ({CHAIN[number - 2][0]} on" in output
        assert number == 1 or f"resuming {folder}/checkpoints/step_{3 * number - 3:06d}" in output
        about = read_metadata(Checkpoints(str(folder)).newest()[0])
        assert (about["strategy"], about["world_size"]) == (strategy, ranks or 1)
    assert len(losses(folder)) == 30
    assert difference(whole, folder) <= 1e-5 and difference(whole, folder, "grad_norm") <= 1e-5


def test_the_fp32_copies_of_bf16_weights_go_along(tmp_path, data):
    """After some steps, a learning rate at which fp32 weights do not change: bf16's rounding of them would show."""
    folder = tmp_path / "out"
    before: dict[str, torch.Tensor] = {}
    for number, (strategy, ranks) in enumerate([("zero1", 2), ("zero3", 2), ("zero2", 0), ("zero1", 4)], 1):
        rate = {"learning_rate": 1e-3 if number == 1 else 1e-12, "decay_lr": False}
        part(folder, data, strategy, ranks, until=4 * number, dtype="bfloat16", **rate)
        saved = open_state(*Checkpoints(str(folder)).newest())
        assert saved.step == 4 * number
        for name, weight in before.items():
            torch.testing.assert_close(saved.whole(name), weight, rtol=0, atol=1e-9)  # bf16 would be 1e-5 off
        before = {name: weight.clone() for name, weight in weights(saved).items()}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in before.values()), "this shows nothing"
