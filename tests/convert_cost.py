"""What converting costs: memory and time for a ZeRO-3 checkpoint of random numbers, beside DeepSpeed's zero_to_fp32.

    python -m tests.convert_cost results/convert                                  # GPT-2 1.5B, 4 ranks
    python -m tests.convert_cost /tmp/small --n_layer=2 --n_embd=256 --n_head=4

The checkpoint and what is written of it lie in --scratch, which needs 24 bytes a parameter; they are removed at the
end. Memory is anonymous memory: pages of mapped files do not count, as the system drops them when memory is short.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPTConfig
from tests.running import ROOT
from training.checkpoint import Checkpoints, Saver
from training.distributed import SINGLE_PROCESS
from training.model_state import WEIGHT, model_shapes
from training.run_folder import environment

THEIRS = (
    "import sys; from deepspeed.utils import zero_to_fp32 as z; import torch; "
    "torch.save(z.get_fp32_state_dict_from_zero_checkpoint(sys.argv[1]), sys.argv[2])"
)


def make(folder: Path, config: GPTConfig, ranks: int) -> None:
    """Write a run folder as train_deepspeed.py leaves it under ZeRO-3: for each rank its part of every parameter."""
    shapes = model_shapes(config)
    groups = [{n: s for n, s in shapes.items() if (len(s) >= 2) == decays} for decays in (True, False)]
    tokenizer = {"name": "gpt2" if config.vocab_size > 50000 else "byte"}
    metadata = {"step": 100, "best_val_loss": None, "evaluated": True, "model": asdict(config), "init_from": "scratch"}
    metadata |= {
        "tokenizer": tokenizer,
        "vocab_size": config.vocab_size,
        "strategy": "zero3",
        "world_size": ranks,
        "dtype": "float32",
    }
    model = {"param_shapes": groups, "module": dict.fromkeys(shapes, torch.empty(0)), "buffer_names": []}
    model |= {"frozen_param_shapes": {}, "frozen_param_fragments": {}, "ds_version": "0.19.8"}
    model["shared_params"] = {"lm_head.weight": "transformer.wte.weight"}
    with Saver(Checkpoints(str(folder))).writing(metadata, best=False) as files:
        for rank in range(ranks):
            states = dict(enumerate(flat_states(groups, rank, ranks)))
            weights = [state.pop(WEIGHT) for state in states.values()]
            optimizer = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": weights}
            optimizer["optimizer_state_dict"] = {"state": states}
            name = f"zero_pp_rank_{rank}_mp_rank_00"
            files.write(f"{name}_optim_states.pt", {"optimizer_state_dict": optimizer, "ds_version": "0.19.8"})
            files.write(f"{name}_model_states.pt", model)


def flat_states(groups: list[dict[str, torch.Size]], rank: int, ranks: int) -> Iterator[dict[str, Tensor]]:
    """The rank's flat weights and moments of each group, with an equal piece of every parameter, padded."""
    generator = torch.Generator().manual_seed(rank)
    for shapes in groups:
        numel = sum(-(-shape.numel() // ranks) for shape in shapes.values())
        state = {kind: torch.rand(numel, generator=generator) * 0.02 for kind in (WEIGHT, "exp_avg", "exp_avg_sq")}
        yield {"step": torch.tensor(100.0), **state}


def measured(command: list[str]) -> dict[str, Any]:
    """CPU seconds and peak memory of a process, and its status: it may be killed because it ran out of memory."""
    before, peak = resource.getrusage(resource.RUSAGE_CHILDREN), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            held = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in held.splitlines() if line.startswith("RssAnon")), 0)
            time.sleep(0.02)
        said.seek(0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        row: dict[str, Any] = {"status": process.returncode, "cpu_seconds": round(seconds, 1)}
        return {**row, "peak_bytes": peak * 1024, "said": said.read().splitlines()[-5:]}


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def compare(scratch: Path, config: GPTConfig, ranks: int) -> list[dict[str, Any]]:
    source = scratch / "zero3"
    make(source, config, ranks)
    newest = source / "checkpoints" / "step_000100"
    (newest.parent / "latest").write_text(newest.name)  # DeepSpeed's tool asks for it
    convert = [sys.executable, "-m", "tools.convert", str(source)]
    cases = {
        "nothing": [sys.executable, "-c", "import tools.convert"],
        "safetensors": [*convert, str(scratch / "safetensors"), "--to=safetensors"],
        "hf": [*convert, str(scratch / "hf"), "--to=hf"],
        "train": [*convert, str(scratch / "train"), "--to=train"],
        "zero_to_fp32": [sys.executable, "-c", THEIRS, str(newest.parent), str(scratch / "zero_to_fp32")],
    }
    rows = []
    for name, command in cases.items():
        row = {"what": name, **measured(command)}
        said = row.pop("said")
        row |= {"said": said[-1].replace(str(scratch), "")} if row["status"] and said else {}
        target = scratch / name.partition(",")[0]
        row["target_bytes"] = size(target)
        for path in [target] if target.exists() else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        rows.append(row)
        print({key: row[key] for key in ("what", "status", "cpu_seconds", "peak_bytes", "target_bytes")}, flush=True)
    largest = max(shape.numel() for shape in model_shapes(config).values())
    shard = max(path.stat().st_size for path in newest.glob("*_optim_states.pt"))
    return [{"what": "source", "bytes": size(newest), "largest_tensor": 4 * largest, "largest_shard": shard}, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder for convert.json")
    parser.add_argument("--scratch", type=Path, help="folder on a disk with room; default: the system's temporary one")
    parser.add_argument("--ranks", type=int, default=4)
    for name, default in (("n_layer", 48), ("n_head", 25), ("n_embd", 1600), ("vocab_size", 50304)):  # GPT-2 XL
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    shape = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    config = GPTConfig(block_size=1024, bias=True, **shape)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        rows = compare(Path(scratch), config, args.ranks)
    about = {
        "model": asdict(config),
        "parameters": config.parameter_count(),
        "ranks": args.ranks,
        "environment": environment(SINGLE_PROCESS),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "convert.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
