"""What converting costs: peak memory and time, of the ZeRO-3 checkpoint of a large model, against the files' sizes.

    python -m tests.convert_cost results/convert                                  # GPT-2 1.5B, 4 ranks
    python -m tests.convert_cost /tmp/small --n_layer=2 --n_embd=256 --n_head=4

The checkpoint is of random numbers, and made as it is converted: by the piece. It, and what is written of it, lie in
--scratch, where 16 bytes a parameter must fit; they are removed at the end. DeepSpeed's own
zero_to_fp32, which reads its files by unpickling them, is beside it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model import GPTConfig
from tests.running import ROOT
from training.distributed import ALONE
from training.formats import fit, zero
from training.formats.options import Options
from training.model_state import SavedState
from training.run_folder import environment
from training.sharding import KINDS

RANDOM = 2**22  # numbers of which all tensors are made
THEIRS = (
    "import sys; from deepspeed.utils import zero_to_fp32 as z; import torch; "
    "torch.save(z.get_fp32_state_dict_from_zero_checkpoint(sys.argv[1]), sys.argv[2])"
)


def random_state(config: GPTConfig) -> SavedState:
    """A model state of any size, a few megabytes of memory: every tensor repeats the same numbers, from another on."""
    numbers = torch.randn(RANDOM, generator=torch.Generator().manual_seed(0)).abs() * 0.02
    pieces = {}
    for place, (name, shape) in enumerate(fit.shapes(config).items()):
        for kind in KINDS:
            first = numbers[(place * 7919 + KINDS.index(kind)) % (RANDOM // 2) :]
            repeats, rest = divmod(max(shape.numel() - len(first), 0), RANDOM)
            pieces[name, kind] = [first[: shape.numel()], *[numbers] * repeats, numbers[:rest]]
    return SavedState(Path("random numbers"), dict(fit.shapes(config)), pieces, step=100.0)


def make(folder: Path, config: GPTConfig, ranks: int) -> None:
    """A run folder of ZeRO-3."""
    about = {"step": 100, "best_val_loss": None, "evaluated": True, "model": asdict(config), "init_from": "scratch"}
    about |= {"tokenizer": {"name": "gpt2" if config.vocab_size > 50000 else "byte"}, "settings": {}}
    zero.write(random_state(config), about, folder, Options(stage=3, ranks=ranks))


def measured(command: list[str]) -> dict[str, Any]:
    """Seconds and peak memory of a process; its status: it may be killed for want of memory.

    (What wait4 says of the peak counts the process as well that it was forked from.)
    """
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            held = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in held.splitlines() if line.startswith("VmHWM")), 0)
            time.sleep(0.02)
        said.seek(0)
        row: dict[str, Any] = {"status": process.returncode, "seconds": round(time.perf_counter() - began, 1)}
        return {**row, "peak_bytes": peak * 1024, "said": said.read().splitlines()[-5:]}


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def compare(scratch: Path, config: GPTConfig, ranks: int) -> list[dict[str, Any]]:
    source = scratch / "zero3"
    make(source, config, ranks)
    newest = source / "checkpoints" / "step_000100"
    (newest.parent / "latest").write_text(newest.name)  # DeepSpeed's tool asks for it
    convert = [sys.executable, "convert.py", str(source)]
    cases = {
        "nothing": [sys.executable, "-c", "import training.formats.conversion"],
        "safetensors": [*convert, str(scratch / "safetensors"), "--to=safetensors"],
        "safetensors, not verified": [*convert, str(scratch / "safetensors"), "--to=safetensors", "--verify=none"],
        "hf": [*convert, str(scratch / "hf"), "--to=hf"],
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
        print({key: row[key] for key in ("what", "status", "seconds", "peak_bytes", "target_bytes")}, flush=True)
    largest = max(shape.numel() for shape in fit.shapes(config).values())
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
        "environment": environment(ALONE),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "convert.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
