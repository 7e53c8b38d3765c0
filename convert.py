"""The weights of a run as one safetensors file.

python convert.py out-gpt2 gpt2.safetensors
python convert.py out-gpt2/checkpoints/step_000500 gpt2.safetensors
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model import GPTConfig
from training import ending
from training.checkpoint import Checkpoints, damage
from training.errors import CheckpointError, ConfigError
from training.saved_state import TIED, open_state


def find(source: Path) -> tuple[Path, dict[str, Any]]:
    """source, a run folder or one of its checkpoints -> the checkpoint and its checkpoint.json."""
    if not (source / "checkpoint.json").exists():
        if not source.is_dir():
            raise CheckpointError(f"{source}: no such folder; name a run folder, or a checkpoint in one")
        return Checkpoints(str(source)).newest()
    if broken := damage(source):
        raise CheckpointError(f"{source} is damaged: {broken}; take another one")
    return source, json.loads((source / "checkpoint.json").read_text())


def write(weights: dict[str, torch.Tensor], about: dict[str, Any], target: Path) -> None:
    """Written beside the target, read back, compared, and then moved there."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        save_file(weights, unfinished, {key: json.dumps(about[key]) for key in ("model", "tokenizer", "step")})
        again = load_file(unfinished)
        assert again.keys() == weights.keys(), f"{target}: other names than were written"
        assert all(torch.equal(again[name], weights[name]) for name in weights), f"{target}: other numbers than written"
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run folder (its newest checkpoint is taken), or one checkpoint")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--to", choices=["safetensors"], default="safetensors", help="format of the target")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    args = parser.parse_args()
    if args.target.exists() and not args.force:
        raise ConfigError(f"{args.target} exists; --force overwrites it")
    folder, about = find(args.source)
    weights = {
        name: w.to(getattr(torch, args.dtype)).clone() for name, w in open_state(folder, about).weights().items()
    }
    weights[TIED] = weights["transformer.wte.weight"].clone()  # tied here; other readers may not know
    write(weights, about, args.target)
    count = GPTConfig(**about["model"]).parameter_count()
    print(f"{args.target}: {count:,} parameters of {folder}, {args.dtype}, {args.target.stat().st_size:,} bytes")


if __name__ == "__main__":
    ending.run(main)
