"""ZeRO-3 builds a model that no rank ever holds whole, bit for bit the one of a single process."""

import json
import os
import subprocess

from tests.running import ROOT, TINY, command, zero_json

# On every rank: the peak of its memory while the model is built, above what it had before; the main one prints all.
CODE = """
import gc, json, sys
from pathlib import Path
import torch
import torch.distributed as dist
import deepspeed
from model import initial_value
from training import deepspeed_config, distributed, ending
from training.batches import Batches
from training.config import parse
from training.deepspeed_config import DeepSpeedTrainConfig
from training.origin import Origin
import train_deepspeed

BEFORE = []

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

class Trainer(train_deepspeed.Trainer):
    def fill(self, origin):
        super().fill(origin)
        gc.collect()
        self.peak = memory("VmHWM") - BEFORE[0]

def main():
    cfg = parse(DeepSpeedTrainConfig, sys.argv[1:], "")
    with distributed.start("cpu", "auto", alone=True) as ranks:
        batches = Batches(cfg, ranks)
        origin = Origin(cfg.model_config(257))
        config = deepspeed_config.read(cfg.deepspeed_config)
        config = deepspeed_config.resolve(cfg, ranks, origin.model, config, torch.float32)
        torch.randn(64, 64) @ torch.randn(64, 64)
        Path("/proc/self/clear_refs").write_text("5")
        BEFORE.append(memory("VmRSS"))
        trainer = Trainer(cfg, ranks, batches, origin, torch.float32, config)
        whole = initial = 0
        for name, parameter in trainer.model.named_parameters():
            assert parameter.numel() == 0 or parameter.ds_persist, name
            with deepspeed.zero.GatheredParameters(parameter):
                whole += parameter.numel() * 4
                initial += torch.equal(parameter, initial_value(name, parameter.shape, origin.model, cfg.seed))
        peaks = [None] * ranks.world_size
        dist.all_gather_object(peaks, trainer.peak)
        if ranks.main:
            print(json.dumps({"whole": whole, "peaks": peaks, "same": initial}))

ending.run(main)
"""


def test_the_model_is_never_whole_and_its_weights_are_those_of_one_process(data, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CODE)
    settings = {**TINY, "dataset": data, "out_dir": tmp_path, "n_layer": 12, "n_head": 8, "n_embd": 512}
    settings |= {"deepspeed_config": zero_json("zero3"), "gradient_accumulation_steps": 4}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back: fragments would count as the model
    arguments = command(str(script), ranks=4, **settings)
    done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] == 12 * 6 + 3, "a parameter starts from other values"
    assert found["whole"] > 150e6
    for peak in found["peaks"]:  # a quarter is its own; a few parameters are in the air
        assert peak < 0.5 * found["whole"], found
