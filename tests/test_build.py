"""Under ZeRO-3 and FSDP2 no rank ever holds the whole model, and its weights are bit-identical to one process's."""

import json
from typing import Any

import pytest

from tests.running import ROOT, TINY, run, zero_json

# Every rank measures its peak memory while the model is built, minus its memory before; rank 0 prints all of them.
CODE = f"""
import ctypes, dataclasses, gc, importlib, json, sys
sys.path.insert(0, {str(ROOT)!r})
ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: freed memory goes back to the system, and counts no more
from pathlib import Path
import torch
import torch.distributed as dist
from model import initial_value
from training import deepspeed_config, distributed
from training.batches import Batches
from training.config import PlainTrainConfig, parse
from training.deepspeed_config import DeepSpeedTrainConfig
from training.init import InitState
from training.fsdp import local_part

BEFORE = [0]
script = importlib.import_module(sys.argv.pop(1).removesuffix(".py"))
zero = script.__name__ == "train_deepspeed"

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

class Trainer(script.Trainer):
    def fill(self, init):
        super().fill(init)
        gc.collect()
        self.peak = memory("VmHWM") - BEFORE[0]

def main():
    cfg = parse(DeepSpeedTrainConfig if zero else PlainTrainConfig, sys.argv[1:], "")
    with distributed.start("cpu", "auto", process_group=True) as ranks:
        batches = Batches(cfg, ranks)
        init, config = InitState(cfg.model_config(257)), []
        if zero:
            json_file = deepspeed_config.read(cfg.deepspeed_config)
            config = [deepspeed_config.resolve(cfg, ranks, init.model, json_file)[0]]
        small = InitState(dataclasses.replace(init.model, n_layer=1, n_embd=16))
        Trainer(cfg, ranks, batches, small, torch.float32, *config)  # so that imports do not count as the model
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        BEFORE[0] = memory("VmRSS")
        trainer = Trainer(cfg, ranks, batches, init, torch.float32, *config)
        whole = initial = 0
        for name, parameter in trainer.model.named_parameters():
            if zero:
                assert parameter.numel() == 0 or parameter.ds_persist, name
                with trainer.deepspeed.zero.GatheredParameters(parameter):
                    value = initial_value(name, parameter.shape, init.model, cfg.seed)
                    initial += torch.equal(parameter, value)
            else:
                value, (mine, start) = initial_value(name, parameter.shape, init.model, cfg.seed), local_part(parameter)
                assert mine.numel() <= -(-len(value) // ranks.world_size) * value[0].numel(), name
                initial += torch.equal(mine.flatten(), value.flatten()[start : start + mine.numel()])
            whole += value.numel() * 4
        peaks = [None] * ranks.world_size
        dist.all_gather_object(peaks, trainer.peak)
        if ranks.main:
            print(json.dumps({{"whole": whole, "peaks": peaks, "identical": initial}}))

distributed.run(main)
"""


SETTINGS: dict[str, dict[str, Any]] = {
    "train.py": {"strategy": "fsdp"},
    "train_deepspeed.py": {"deepspeed_config": zero_json("zero3")},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_model_is_never_whole_and_has_the_weights_of_one_process(data, tmp_path, name):
    script = tmp_path / "script.py"
    script.write_text(CODE)
    settings = {**TINY, "dataset": data, "out_dir": tmp_path, "n_layer": 8, "n_head": 8, "n_embd": 512}
    settings |= {**SETTINGS[name], "gradient_accumulation_steps": 4}
    done = run(str(script), name, ranks=4, **settings)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["identical"] == 8 * 6 + 3, "a parameter has different initial values"
    assert found["whole"] > 100e6
    for peak in found["peaks"]:  # its own quarter, and a few gathered parameters
        assert peak < 0.5 * found["whole"], found
