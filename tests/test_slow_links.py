"""Training over slow links: gradients in 16 bits, PowerSGD, DiLoCo."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPT
from tests.running import TINY, difference, losses, refused, rows, train, zero_json
from training.batches import Batches
from training.checkpoint import Checkpoints
from training.config import PlainTrainConfig, parse
from training.distributed import SINGLE_PROCESS
from training.init import find_init_state
from training.model_state import read_torch_file
from training.optim import make_optimizer, set_learning_rate

RUN: dict[str, Any] = {"gradient_accumulation_steps": 4, "max_iters": 14, "eval_interval": 14}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero3"])
def test_gradients_are_sent_in_16_bits(tmp_path, data, strategy):
    own = {"deepspeed_config": zero_json(strategy)} if strategy.startswith("zero") else {"strategy": strategy}
    for dtype in ("float32", "bfloat16"):
        train(tmp_path / dtype, data, ranks=2, grad_dtype=dtype, **own, **RUN)
    assert 0 < difference(tmp_path / "float32", tmp_path / "bfloat16") < 5e-3
    norms = difference(tmp_path / "float32", tmp_path / "bfloat16", "grad_norm")
    assert 0 < norms < 0.01, "bfloat16 has 8 bits of precision"


def test_powersgd_trains_and_resumes_exactly(tmp_path, data):
    """Each rank's checkpoint file has what its gradients left out; other numbers of ranks do without."""
    settings: dict[str, Any] = {**RUN, "grad_compression": "powersgd", "warmup_iters": 3, "ranks": 2}
    settings |= {"n_embd": 128, "eval_iters": 1}  # DDP has several buckets of gradients
    train(tmp_path / "plain", data, **{**settings, "grad_compression": "none"})
    train(tmp_path / "whole", data, **settings)
    train(tmp_path / "parts", data, **{**settings, "max_iters": 7})
    train(tmp_path / "parts", data, **{**settings, "init_from": "resume"})
    assert difference(tmp_path / "whole", tmp_path / "parts") == 0
    plain, whole = losses(tmp_path / "plain"), losses(tmp_path / "whole")
    assert [plain[step] == whole[step] for step in range(5)] == [True] * 4 + [False], "starts after the warm-up"
    assert 0 < difference(tmp_path / "plain", tmp_path / "whole") < 0.5 and whole[13] < whole[0] - 1, "still learns"
    train(tmp_path / "whole", data, **{**settings, "init_from": "resume", "max_iters": 16, "ranks": 4})


def diloco_by_hand(cfg: PlainTrainConfig, folder: Path, ranks: int) -> list[float]:
    """Mean losses over the ranks, by the formulas of the paper: algorithm 1, with Nesterov's momentum."""
    everyone = [replace(SINGLE_PROCESS, rank=rank, world_size=ranks) for rank in range(ranks)]
    batches = [Batches(cfg, one) for one in everyone]
    init = find_init_state(cfg, Checkpoints(str(folder)), batches[0].dataset)
    models = [GPT(init.model) for _ in everyone]
    for model in models:
        model.load_state_dict({n: init.value(n, p.shape, cfg.seed) for n, p in model.named_parameters()}, strict=False)
    optimizers = [make_optimizer(model, cfg) for model in models]
    anchor = [p.detach().clone() for p in models[0].parameters()]
    momentum = [torch.zeros_like(p) for p in anchor]
    means = []
    for step in range(cfg.max_iters):
        mean = 0.0
        for model, optimizer, source in zip(models, optimizers, batches, strict=True):
            set_learning_rate(optimizer, cfg, step)
            for micro_step in range(source.micro_steps):
                loss = model(*source.train(step, micro_step)) / source.micro_steps
                loss.backward()
                mean += loss.item() / ranks
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        means.append(mean)
        if (step + 1) % cfg.outer_steps == 0:
            with torch.no_grad():
                for own, moved, *weights in zip(anchor, momentum, *(m.parameters() for m in models), strict=True):
                    change = own - torch.stack(weights).mean(0)
                    moved.mul_(0.9).add_(change)
                    own -= 0.7 * (change + 0.9 * moved)
                    for weight in weights:
                        weight.copy_(own)
    return means


def test_diloco_is_that_of_the_paper_and_resumes_exactly(tmp_path, data, monkeypatch):
    settings: dict[str, Any] = {**RUN, "outer_steps": 4}
    train(tmp_path / "whole", data, ranks=2, **settings)
    words = [f"--{k}={v}" for k, v in {**TINY, **settings, "dataset": data, "out_dir": tmp_path / "hand"}.items()]
    with monkeypatch.context() as changed:
        changed.setenv("WORLD_SIZE", "2")  # of which the settings are checked
        cfg = parse(PlainTrainConfig, words, "")
    by_hand = diloco_by_hand(cfg, tmp_path / "hand", 2)
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "whole").values(), by_hand, strict=True)) <= 1e-6
    # stopped between two exchanges, where ranks differ, and then right after one
    for end in (6, 8, 14):
        train(tmp_path / "parts", data, ranks=2, **{**settings, "max_iters": end, "resume": "auto"})
        newest = Checkpoints(str(tmp_path / "parts")).newest()[0]
        weights = read_torch_file(newest / "model.pt"), read_torch_file(newest / "replica_00001.pt")["model"]
        same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert same == (end % 4 == 0)
    assert difference(tmp_path / "whole", tmp_path / "parts") == 0
    assert rows(tmp_path / "parts", "eval")[-1]["val_loss"] == rows(tmp_path / "whole", "eval")[-1]["val_loss"]


def test_diloco_goes_on_from_and_to_other_runs(tmp_path, data):
    """On more ranks, on fewer, and from and to a strategy that knows nothing of it."""
    settings: dict[str, Any] = {**RUN, "outer_steps": 4, "init_from": "resume"}
    train(tmp_path, data, ranks=2, **{**RUN, "max_iters": 3})
    for ranks, end, own in ((2, 6, {}), (4, 9, {}), (2, 11, {}), (2, 14, {"strategy": "fsdp", "outer_steps": 0})):
        train(tmp_path, data, ranks=ranks, **{**settings, **own, "max_iters": end})
    curve = losses(tmp_path)
    assert len(curve) == 14 and curve[13] < curve[0] - 0.05


@pytest.mark.parametrize(
    "ranks, words, expected",
    [
        (0, {"outer_steps": 4}, "outer_steps = 4 (command line): needs DDP on several ranks"),
        (2, {"outer_steps": 4, "strategy": "fsdp"}, "needs DDP on several ranks, without sequence_parallel"),
        (2, {"grad_compression": "powersgd", "sequence_parallel": 2}, "needs DDP on several ranks, without"),
        (2, {"grad_compression": "powersgd", "outer_steps": 4}, "cannot be combined with outer_steps"),
        (2, {"grad_compression": "topk"}, "grad_compression = 'topk' (command line): must be none or powersgd"),
        (2, {"outer_steps": -1}, "outer_steps = -1 (command line): must not be negative"),
        (2, {"grad_dtype": "int8"}, "grad_dtype = 'int8' (command line): must be one of auto, float32"),
        (2, {"outer_steps": 4, "deepspeed_config": zero_json("zero1")}, "it belongs to train.py and ./launch_trad"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(tmp_path, data, ranks, words, expected):
    assert expected in refused(tmp_path, data, ranks=ranks, **{"gradient_accumulation_steps": 4, **words})
