"""A conversion's memory: of a chunk, or a tensor, not of the model."""

import sys
from pathlib import Path

import pytest

from model import GPTConfig
from tests.convert_cost import make, measured

# 33M parameters, 134 MB of weights, 400 MB with moments; the largest tensor has 34 MB
MEDIUM = GPTConfig(block_size=64, vocab_size=16384, n_layer=8, n_head=8, n_embd=512)
TINY = GPTConfig(block_size=64, vocab_size=512, n_layer=1, n_head=2, n_embd=16)
LARGEST = 4 * MEDIUM.vocab_size * MEDIUM.n_embd
CONSTANT = 64e6


def peak(source: Path, *arguments: str) -> int:
    row = measured([sys.executable, "convert.py", str(source), *arguments])
    assert row["status"] == 0 and "verified: every tensor equal; logits" in row["said"][-1], row
    return row["peak_bytes"]


@pytest.mark.parametrize("to", ["deepspeed", "hf"])
def test_peak_memory_does_not_grow_with_the_model(tmp_path, to):
    """Read, written, read again and compared; of the HF folder, matrices are transposed as well."""
    peaks = {}
    for name, config in (("tiny", TINY), ("medium", MEDIUM)):
        make(tmp_path / name, config, ranks=4)
        options = ["--ranks=2", "--stage=2", "--max_shard_size=50MB"]
        peaks[name] = peak(tmp_path / name, str(tmp_path / f"{name}-{to}"), f"--to={to}", *options)
    state = 12 * MEDIUM.parameter_count()
    assert peaks["medium"] - peaks["tiny"] <= 1.2 * LARGEST + CONSTANT < state / 3, peaks
