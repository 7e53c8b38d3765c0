"""What DDP sends: each gradient once a step, however many micro-steps there are."""

from tests.running import ROOT, TINY, run

# On both ranks: the shapes that a step all-reduces, by the profiler's account; the main rank prints their number.
CODE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from train import Trainer
from training import distributed
from training.batches import Batches
from training.config import parse
from training.init import InitState
from training.config import PlainTrainConfig

cfg = parse(PlainTrainConfig, sys.argv[1:], "")
with distributed.start("cpu", "auto") as ranks:
    batches = Batches(cfg, ranks)
    trainer = Trainer(cfg, ranks, batches, InitState(cfg.model_config(257)), torch.float32)
    for step in range(2):
        trainer.train_step(step)
    with torch.profiler.profile() as profile:
        trainer.train_step(2)
    if ranks.main:
        print(batches.micro_steps, sum(e.count for e in profile.key_averages() if "allreduce" in e.key.lower()))
"""


def all_reduces(data, tmp_path, accumulation: int) -> tuple[int, int]:
    script = tmp_path / "script.py"
    script.write_text(CODE)
    done = run(str(script), ranks=2, **{**TINY, "dataset": data, "gradient_accumulation_steps": accumulation})
    assert done.returncode == 0, done.stderr
    micro_steps, count = map(int, done.stdout.split())
    return micro_steps, count


def test_one_all_reduce_a_step(data, tmp_path):
    micro_steps, count = all_reduces(data, tmp_path, 2)
    assert micro_steps == 1 and count > 0
    assert all_reduces(data, tmp_path, 8) == (4, count)
