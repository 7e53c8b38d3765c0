"""Tensor, pipeline, sequence and expert parallelism: the losses of one process, whatever layout goes on from which."""

from pathlib import Path
from typing import Any

import pytest

from tests.running import difference, losses, train, zero_json
from training.checkpoint import Checkpoints, read_metadata
from training.distributed import Layout

SHAPE = {"n_layer": 4, "n_head": 8, "n_embd": 32}
RUN: dict[str, Any] = {"gradient_accumulation_steps": 4, "lr_decay_iters": 30, "log_interval": 1, **SHAPE}
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "n_hidden": 48, "n_kv_head": 4, "rope_theta": 1e4, "tied": False}
LLAMA |= {"qk_norm": True}
# 3 steps each, from what the one before it has written: (ranks, ZeRO stage or "" for train.py, layout)
DENSE = [
    *[(0, "", {}), (2, "1", {"tensor": 2}), (4, "1", {"pipeline": 2, "tensor": 2}), (2, "", {"sequence": 2})],
    *[(4, "3", {"tensor": 2}), (2, "1", {"pipeline": 2}), (4, "2", {"tensor": 2, "sequence": 2}), (2, "3", {})],
    *[(4, "1", {"pipeline": 2, "sequence": 2}), (2, "2_offload", {"tensor": 2})],
]
EXPERTS = [
    *[(0, "", {}), (2, "1", {"expert": 2}), (4, "2", {"expert": 2}), (2, "3", {"expert": 2}), (2, "", {})],
    *[
        (4, "3", {"expert": 2, "tensor": 2}),
        (4, "3", {"expert": 2}),
        (4, "1", {"expert": 2, "pipeline": 2}),
        (2, "1", {}),
    ],
]


def part(folder: Path, data: Path, ranks: int, stage: str, layout: dict[str, int], until: int, **settings: Any) -> str:
    given = {**RUN, **{f"{name}_parallel": size for name, size in layout.items()}, **settings}
    given |= {"deepspeed_config": zero_json(f"zero{stage}")} if stage else {}
    return train(folder, data, ranks=ranks, max_iters=until, resume="auto", **given)


@pytest.mark.parametrize(
    "chain, model",
    [(DENSE, {"bias": True}), (DENSE, LLAMA), (EXPERTS, {**LLAMA, "n_expert": 4, "expert_balance": 0.0})],
    ids=["gpt2", "llama", "experts"],
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
