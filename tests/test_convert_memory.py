"""The memory of a conversion: Hugging Face's folder is written and compared one file of weights at a time."""

import sys
from pathlib import Path

from model import GPTConfig
from tests.convert_cost import make, measured

TINY = GPTConfig(block_size=64, vocab_size=512, n_layer=1, n_head=2, n_embd=16)
MEDIUM = GPTConfig(block_size=64, vocab_size=1024, n_layer=12, n_head=8, n_embd=512)
SHARD_SIZE = 20_000_000  # bytes; the largest tensor has 4 MB, all weights 153 MB, the model state 460 MB


def peak(source: Path, target: Path) -> int:
    code = f"from tools import convert; convert.MAX_SHARD_BYTES = {SHARD_SIZE}; convert.main()"
    row = measured([sys.executable, "-c", code, str(source), str(target), "--to=hf"])
    assert row["status"] == 0 and "verified: every tensor equal" in row["said"][-1], row
    return row["peak_bytes"]


def test_peak_memory_does_not_grow_with_the_model(tmp_path):
    peaks = {}
    for name, config in (("tiny", TINY), ("medium", MEDIUM)):
        make(tmp_path / name, config, ranks=4)
        peaks[name] = peak(tmp_path / name, tmp_path / f"{name}-hf")
    weights = 4 * MEDIUM.parameter_count()
    assert peaks["medium"] - peaks["tiny"] <= SHARD_SIZE + 40e6 < weights / 2, peaks
