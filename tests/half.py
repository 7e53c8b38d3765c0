"""Run a train script in fp16 on any CPU, with a loss scale that overflows at first: python -m tests.half SCRIPT ..."""

import importlib
import sys
from functools import partial
from typing import Any

import torch

from training.distributed import run

SCALE_POWER = 21

if __name__ == "__main__":
    modules: Any = torch
    modules.ops.mkldnn._is_mkldnn_fp16_supported = lambda: True  # where it is not, fp16 is slow, but correct
    modules.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.0**SCALE_POWER)
    script = importlib.import_module(sys.argv.pop(1).removesuffix(".py"))
    run(script.main)
