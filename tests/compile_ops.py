"""Compile DeepSpeed's C++ ops before the tests need them, beside lint and types: python -m tests.compile_ops"""

import json
import os

from tests import needs
from tests.running import ROOT, zero_json

os.environ["DS_ACCELERATOR"] = "cpu"

if __name__ == "__main__":
    import deepspeed

    from training import deepspeed_engine
    from training.distributed import SINGLE_PROCESS

    strategy = "zero3_nvme" if needs.find("libaio") else "zero3_offload"
    deepspeed_engine.load(deepspeed, json.loads((ROOT / zero_json(strategy)).read_text()), SINGLE_PROCESS)
