"""Bytes of model state on each rank of a run of train_deepspeed.py, counted in its second step before the update.

    python -m launch.ranks 2 -m tests.layout_state FOLDER config/train_debug.py --tensor_parallel=2 ...

Writes FOLDER/state_<rank>.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

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

    train_deepspeed.Trainer = Trainer  # type: ignore[assignment, misc]
    train_deepspeed.main()


if __name__ == "__main__":
    run(main)
