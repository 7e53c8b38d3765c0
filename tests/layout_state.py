"""Bytes on each rank of a run of train_deepspeed.py: model state in its second step before the update, activations.

    python -m launch.ranks 2 -m tests.layout_state FOLDER config/train_debug.py --tensor_parallel=2 ...

Writes FOLDER/state_<rank>.json, and FOLDER/saved_<rank>.json: what forward of a micro-step saves for backward.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train_deepspeed
from tools.benchmark_probe import count_tensors
from training.distributed import rank, run


def main() -> None:
    folder, *sys.argv[1:] = sys.argv[1:]

    class Trainer(train_deepspeed.Trainer):
        def __init__(self, *args: Any):
            super().__init__(*args)
            update, self.optimizer.step = self.optimizer.step, self.step_counted
            self.update = update

        def step_counted(self, *args: Any, **options: Any) -> Any:
            if self.engine.global_steps == 1:
                Path(folder, f"state_{rank()}.json").write_text(json.dumps(count_tensors(self, "cpu")))
            return self.update(*args, **options)

        def train_step(self, step: int) -> dict[str, Any]:
            if step > 0:  # while activations are kept here, they would count as model state
                return super().train_step(step)
            saved, own = dict[int, Tensor](), {p.untyped_storage().data_ptr() for p in self.model.parameters()}

            def pack(tensor: Tensor) -> Tensor:
                if tensor.untyped_storage().data_ptr() not in own:
                    saved[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                metrics = super().train_step(step)
            size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
            Path(folder, f"saved_{rank()}.json").write_text(json.dumps(size / self.batches.micro_steps))
            return metrics

    train_deepspeed.Trainer = Trainer  # type: ignore[assignment, misc]
    train_deepspeed.main()


if __name__ == "__main__":
    run(main)
