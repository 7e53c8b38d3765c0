"""nanoGPT's train.py beside ours: the same shape, batch, accumulation, dtype and steps, from a checkout of it.

It reads data/<dataset>/ and configurator.py of the folder that it is started in: that is a temporary one with links to
both, and nothing is written into the checkout. Its DDP needs GPUs; without them it runs in one process. Its weights and
batches are others than ours, so its losses are not compared; its speed is what it prints, without the first steps.
"""

import pickle
import re
import sys
from pathlib import Path
from typing import Any

from data.dataset import open_dataset
from training.batches import DATA
from training.errors import UserError
from training.metrics import WARM_UP_STEPS
from training.train_config import TrainConfig

FILES = ("train.py", "model.py", "configurator.py")
LINE = re.compile(r"iter (\d+): loss ([\d.]+|nan), time ([\d.]+)ms")
SAME = (  # keys that both have, in the same meaning
    *("gradient_accumulation_steps", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias"),
    *("learning_rate", "weight_decay", "beta1", "beta2", "grad_clip", "decay_lr", "warmup_iters", "lr_decay_iters"),
    *("min_lr", "compile"),
)


def check(path: Path, cfg: TrainConfig) -> None:
    """Raises UserError where the folder is no nanoGPT, or the run is one that it cannot do."""
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing or "configurator.py" not in (path / "train.py").read_text(errors="replace"):
        lacks = f"it has no {missing[0]}" if missing else "its train.py is another one"
        raise UserError(f"--peer={path}: is no checkout of nanoGPT: {lacks}; name the folder that holds its train.py")
    if (found := open_dataset(DATA / cfg.dataset)).dtype.itemsize != 2:
        raise UserError(f"--peer={path}: nanoGPT reads token ids of 16 bits, {found.path('train')} has others")


def prepare(folder: Path, path: Path, cfg: TrainConfig) -> None:
    """A folder to start it in."""
    dataset = open_dataset(DATA / cfg.dataset)
    (folder / "data" / "same").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / "data" / "same" / f"{split}.bin").symlink_to(dataset.path(split).resolve())
    vocabulary = {"vocab_size": cfg.model_config(dataset.vocab_size).vocab_size}
    (folder / "data" / "same" / "meta.pkl").write_bytes(pickle.dumps(vocabulary))
    (folder / "configurator.py").symlink_to((path / "configurator.py").resolve())


def command(path: Path, cfg: TrainConfig, ranks: int, steps: int, on_gpu: bool) -> list[str]:
    """env: Python writes its caches beside the modules that it imports otherwise."""
    settings = {name: value for name, value in vars(cfg).items() if name in SAME}
    settings |= {"dataset": "same", "out_dir": "out", "device": "cuda" if on_gpu else "cpu"}
    settings |= {} if cfg.dtype == "auto" else {"dtype": cfg.dtype}  # which it picks as we do; not on a CPU
    settings |= {"max_iters": steps - 1, "log_interval": 1, "eval_interval": 10**9, "eval_iters": 1}
    launcher = [str(Path("launch.py").resolve()), str(ranks)] if ranks > 1 else []
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    python = ["env", "PYTHONDONTWRITEBYTECODE=1", sys.executable, "-u"]
    return [*python, *launcher, str(path.resolve() / "train.py"), *arguments]


def rows(said: list[str], tokens_per_step: int) -> list[dict[str, Any]]:
    """What it printed, as rows of metrics.jsonl; the first steps are not timed, as ours."""
    found = [match for line in said if (match := LINE.match(line))]
    result = []
    for step, loss, ms in (match.groups() for match in found):
        timed = float(ms) if int(step) >= WARM_UP_STEPS else None
        row = {"step": int(step), "loss": float(loss), "step_ms": timed, "mfu": None, "peak_memory_bytes": 0}
        result.append({**row, "tokens_per_second": timed and tokens_per_step / timed * 1e3})
    return result
