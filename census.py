"""The model state of a rank, counted: a train script of two steps that notes the bytes of all living tensors.

    python launch.py 2 census.py note.json train_deepspeed.py config/train_debug.py --deepspeed_config=...

benchmark.py --memory runs it. The count is taken in the second step, when the gradients are there and the update is
still to come, after the micro-step that has most; DeepSpeed's communication buffers are counted for themselves.
"""

import gc
import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from training import ending
from training.memory import model_state


def live_tensors() -> list[Tensor]:
    """Gradients have no Python object of their own until they are asked for."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.device.type != "meta"]
    return tensors + [t.grad for t in tensors if t.is_leaf and t.grad is not None]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once, however many tensors look at it."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def buffers(optimizer: Any) -> list[Tensor]:
    """What DeepSpeed collects gradients in before it reduces them: reduce_bucket_size elements, twice if overlapped."""
    found = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    return [t for buffer in found if buffer is not None for t in (buffer if isinstance(buffer, list) else [buffer])]


def main() -> None:
    note, *argv = sys.argv[1:]
    script: Any = importlib.import_module(argv[0].removesuffix(".py"))
    seen: list[tuple[int, int]] = []
    trainers: list[Any] = []

    class Watched(script.Trainer):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.now = 0
            trainers.append(self)
            if hasattr(self, "engine"):
                self.update, self.engine.step = self.engine.step, self.look_and_update
            else:
                register_optimizer_step_pre_hook(lambda *_: self.look())

        def look_and_update(self) -> None:
            self.look()
            self.update()

        def look(self) -> None:
            if self.now == 1:
                extra = buffers(self.optimizer)
                seen.append((storage_bytes(live_tensors()) - storage_bytes(extra), storage_bytes(extra)))

        def train_step(self, step: int) -> Any:
            self.now = step
            return super().train_step(step)

    script.Trainer, sys.argv = Watched, [*argv, "--max_iters=2"]
    script.main()
    (trainer,) = trainers
    if trainer.ranks.main:
        parameters = trainer.model.config.parameter_count()
        accumulation = getattr(trainer, "engine", None) and trainer.engine._config.grad_accum_dtype == "fp32"
        world_size = trainer.ranks.world_size
        expected = model_state(trainer.strategy, world_size, parameters, trainer.dtype, bool(accumulation)).total()
        found = {"model_state_bytes": max(seen)[0], "buffer_bytes": max(extra for _, extra in seen)}
        Path(note).write_text(json.dumps({"parameters": parameters, **found, "expected_bytes": round(expected)}))


if __name__ == "__main__":
    ending.run(main)
