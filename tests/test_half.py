"""fp16 under every strategy: a loss scale that overflows at first, checkpoints across strategies."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.half import SCALE_POWER
from tests.running import ROOT, TINY, losses, rows, run, zero_json
from training.checkpoint import Checkpoints
from training.model_state import open_state

STRATEGIES = ("single", "fsdp", "zero0", "zero2", "zero3")
SETTINGS: dict[str, Any] = {
    **TINY,
    **{"dtype": "float16", "max_iters": 120, "lr_decay_iters": 120, "learning_rate": 5e-4, "min_lr": 1e-5},
    **{"warmup_iters": 20, "gradient_accumulation_steps": 2, "eval_iters": 20},
}


def train(folder: Path, data: Path, strategy: str, **settings: Any) -> None:
    settings = {**SETTINGS, "dataset": data, "out_dir": folder, **settings}
    script = "train.py"
    if strategy.startswith("zero"):
        config = json.loads((ROOT / zero_json(strategy)).read_text())
        config["fp16"]["initial_scale_power"] = SCALE_POWER
        path = folder.with_name(f"{strategy}.json")
        path.write_text(json.dumps(config))
        script, settings = "train_deepspeed.py", {**settings, "deepspeed_config": path}
    elif strategy != "single":
        settings["strategy"] = strategy
    done = run("-m", "tests.half", script, **settings)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def fp32(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fp32") / "run"
    train(folder, data, "single", dtype="float32")
    return rows(folder, "eval")[-1]["val_loss"]


@pytest.fixture(scope="module")
def half(tmp_path_factory, data):
    """(strategy) -> the run folder of 120 steps in fp16."""
    folders: dict[str, Path] = {}

    def make(strategy: str) -> Path:
        if strategy not in folders:
            folders[strategy] = tmp_path_factory.mktemp(strategy) / "run"
            train(folders[strategy], data, strategy)
        return folders[strategy]

    return make


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp16_learns_as_fp32_does(half, fp32, strategy):
    norms = losses(half(strategy), "grad_norm")
    skipped = [step for step, norm in norms.items() if not math.isfinite(norm)]
    assert len(norms) == 120 and 0 in skipped and len(skipped) < 10
    assert all(norm < 10 for step, norm in norms.items() if step not in skipped), "of unscaled gradients"
    # the skipped steps are missing: a few of 120, at the smallest learning rates
    assert abs(rows(half(strategy), "eval")[-1]["val_loss"] - fp32) < 0.02


def test_each_strategy_resumes_the_others_in_fp16(half, data, tmp_path):
    """With the loss scale that they ended with, which is lower than that of a new run."""
    folder = tmp_path / "run"
    shutil.copytree(half("single"), folder)
    scales = []
    for number, strategy in enumerate(("zero0", "zero2", "fsdp", "zero3", "single")):
        train(folder, data, strategy, init_from="resume", max_iters=122 + 2 * number)
        scales.append(open_state(*Checkpoints(str(folder)).newest()).scaler["scale"])
    first = open_state(*Checkpoints(str(half("single"))).newest()).scaler["scale"]
    overflows = [not math.isfinite(norm) for norm in list(losses(folder, "grad_norm").values())[120:]]
    assert len(overflows) == 10 and sum(overflows) < 3
    assert 2**SCALE_POWER > first >= scales[0] and scales == sorted(scales, reverse=True)
    assert first / scales[-1] <= 2 ** sum(overflows)
