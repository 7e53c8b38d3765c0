"""nanoGPT itself, where NANOGPT names a checkout: it writes a checkpoint, and goes on from one of ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import GPTConfig
from tests.checkpoints import logits
from training import files
from training.formats.conversion import convert
from training.formats.options import Options
from training.formats.source import open_source

NANOGPT = Path(os.environ.get("NANOGPT", "nowhere"))
pytestmark = pytest.mark.skipif(not (NANOGPT / "model.py").is_file(), reason="NANOGPT names no checkout of nanoGPT")
SETTINGS = {
    **{"device": "cpu", "compile": False, "dtype": "float32", "eval_iters": 1, "eval_interval": 3, "log_interval": 1},
    **{"block_size": 32, "batch_size": 4, "gradient_accumulation_steps": 1, "n_layer": 2, "n_head": 2, "n_embd": 32},
    **{"learning_rate": 1e-3, "warmup_iters": 2, "beta2": 0.99},
}
# its model, so that ours is compared with it and not with what we think that it is
LOGITS = (
    "import sys, torch; from model import GPT, GPTConfig; c = torch.load(sys.argv[1]);"
    "m = GPT(GPTConfig(**c['model_args'])); m.load_state_dict(c['model']);"
    "torch.save(m.eval()(torch.load(sys.argv[2]))[0][:, -1].detach(), sys.argv[3])"
)


def theirs(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=NANOGPT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(out: Path, data: Path, **settings) -> list[str]:
    """The losses that its train.py prints."""
    said = theirs(
        "train.py", *(f"--{k}={v}" for k, v in {**SETTINGS, "dataset": data, "out_dir": out, **settings}.items())
    )
    return re.findall(r"iter \d+: loss [\d.]+", said)


def test_it_goes_on_from_what_went_through_all_our_formats(data, tmp_path):
    """Its own checkpoint, by way of ZeRO-3's partitions, back to it: the same losses as without that way."""
    run(tmp_path / "own", data, max_iters=3)
    tokens = torch.randint(257, (2, 20))
    torch.save(tokens, tmp_path / "tokens")
    theirs("-c", LOGITS, str(tmp_path / "own" / "ckpt.pt"), str(tmp_path / "tokens"), str(tmp_path / "logits"))
    at = tmp_path / "own"
    for to in ("train", "deepspeed", "universal", "nanogpt"):
        convert(str(at), tmp_path / to, to, Options(stage=3, ranks=3))
        at = tmp_path / to
        saved, about = open_source(str(at), Options())
        assert (about["step"], saved.step, about["settings"]["beta2"]) == (3, 3, 0.99)
        expected = files.read(tmp_path / "logits")
        torch.testing.assert_close(logits(saved, GPTConfig(**about["model"]), tokens), expected, rtol=0, atol=1e-6)
    own, ours = (run(out, data, max_iters=8, init_from="resume") for out in (tmp_path / "own", at))
    assert own == ours and len(own) == 6
    assert own[-1].startswith("iter 8")
