"""nanoGPT itself, where NANOGPT names a checkout: it goes on from a checkpoint of ours, and we from one of its own."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import GPTConfig
from tests.checkpoints import BYTES, logits
from tests.running import losses, train, zero_json
from tools.convert import convert
from tools.convert_read import open_source
from training.batches import Batches
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.distributed import SINGLE_PROCESS
from training.model_state import open_state, read_torch_file

NANOGPT = Path(os.environ.get("NANOGPT") or "nowhere")
pytestmark = pytest.mark.skipif(not (NANOGPT / "model.py").is_file(), reason="NANOGPT names no checkout of nanoGPT")
SETTINGS: dict[str, Any] = {
    **{"device": "cpu", "compile": False, "dtype": "float32", "eval_iters": 1, "eval_interval": 3, "log_interval": 1},
    **{"block_size": 32, "batch_size": 4, "gradient_accumulation_steps": 1, "n_layer": 2, "n_head": 2, "n_embd": 32},
    **{"learning_rate": 1e-3, "warmup_iters": 2, "beta2": 0.99},
}
HALF, END = 10, 20
GOES_ON: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "eval_interval": HALF,
    "lr_decay_iters": END,
    "min_lr": 1e-4,
}
# its model, so that ours is compared with it and not with what we think that it is
LOGITS = (
    "import sys, torch; from model import GPT, GPTConfig; c = torch.load(sys.argv[1]);"
    "m = GPT(GPTConfig(**c['model_args'])); m.load_state_dict(c['model']);"
    "torch.save(m.eval()(torch.load(sys.argv[2]))[0][:, -1].detach(), sys.argv[3])"
)

# Its train.py as it is, but for which sequences it trains on: they are given, where it would draw them. (Evaluation
# draws as ever.) When it asks for the next ones, its variable `loss` is of the micro-step that it has just computed.
SAME_BATCHES = """
import runpy, sys, torch
_, starts, losses, *arguments = sys.argv
starts, found, draw = iter(torch.load(starts)), [], torch.randint
def given(high, size):
    asks = sys._getframe(2)  # who called get_batch
    if asks.f_code.co_name == 'estimate_loss':
        return draw(high, size)
    found.extend([asks.f_globals['loss'].item()] if 'loss' in asks.f_globals else [])
    return next(starts)
torch.randint, sys.argv = given, ['train.py', *arguments]
runpy.run_path('train.py', run_name='__main__')
torch.save(torch.tensor(found), losses)
"""


def theirs(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=NANOGPT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def arguments(out: Path, data: Path, **settings) -> list[str]:
    return [f"--{k}={v}" for k, v in {**SETTINGS, "dataset": data, "out_dir": out, **settings}.items()]


def run(out: Path, data: Path, **settings) -> list[str]:
    """The losses that its train.py prints."""
    return re.findall(r"iter \d+: loss [\d.]+", theirs("train.py", *arguments(out, data, **settings)))


def their_logits(file: Path, tokens: torch.Tensor, scratch: Path) -> torch.Tensor:
    torch.save(tokens, scratch / "tokens")
    theirs("-c", LOGITS, str(file), str(scratch / "tokens"), str(scratch / "logits"))
    return read_torch_file(scratch / "logits")


def test_it_goes_on_from_what_went_through_all_our_formats(data, tmp_path):
    """Its own checkpoint, converted to a run folder and back: the same losses as without the conversions."""
    run(tmp_path / "own", data, max_iters=3)
    tokens = torch.randint(257, (2, 20))
    expected = their_logits(tmp_path / "own" / "ckpt.pt", tokens, tmp_path)
    at = tmp_path / "own"
    for to in ("train", "nanogpt"):
        convert(str(at), tmp_path / to, to, tokenizer=BYTES)
        at = tmp_path / to
        saved, about = open_source(str(at))
        assert (about["step"], saved.step, about["settings"]["beta2"]) == (3, 3, 0.99)
        torch.testing.assert_close(logits(saved, GPTConfig(**about["model"]), tokens), expected, rtol=0, atol=1e-6)
    own, ours = (run(out, data, max_iters=8, init_from="resume") for out in (tmp_path / "own", at))
    assert own == ours and len(own) == 6
    assert own[-1].startswith("iter 8")


def goes_on(out: Path, data: Path, scratch: Path) -> torch.Tensor:
    """The losses of its steps HALF ... END, of our batches; the last step's weights are not saved."""
    given = {**SETTINGS, **GOES_ON}
    sampling = {key: given[key] for key in ("block_size", "batch_size", "gradient_accumulation_steps")}
    batches = Batches(TrainConfig(dataset=str(data), **sampling), SINGLE_PROCESS)
    starts = [batches.draw("training", step, batches.micro_steps) for step in range(HALF, END + 2)]  # it asks ahead
    torch.save(torch.from_numpy(np.concatenate(starts)), scratch / "starts")
    told = arguments(out, data, **GOES_ON, max_iters=END, init_from="resume")
    theirs("-c", SAME_BATCHES, str(scratch / "starts"), str(scratch / "losses"), *told)
    micro_steps = read_torch_file(scratch / "losses").view(-1, batches.micro_steps)  # each divided by their number
    return micro_steps.sum(1)


def test_we_go_on_from_its_checkpoint(data, tmp_path):
    """By train.py and by ZeRO-2 on 2 ranks: to the losses, weights and moments of nanoGPT going on."""
    words, own = tmp_path / "words", tmp_path / "own"
    shutil.copytree(data, words)
    (words / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 257}))  # or it takes GPT-2's
    run(own, words, **GOES_ON, max_iters=HALF)
    tokens = torch.randint(257, (2, 20))
    expected = their_logits(own / "ckpt.pt", tokens, tmp_path)
    torch.save({**read_torch_file(own / "ckpt.pt"), "optimizer": {}}, tmp_path / "weights.pt")
    for source, to in ((own, "single"), (own, "zero2"), (tmp_path / "weights.pt", "forgotten")):
        convert(str(source), tmp_path / to, "train", tokenizer=BYTES)
        saved, about = open_source(str(tmp_path / to))
        torch.testing.assert_close(logits(saved, GPTConfig(**about["model"]), tokens), expected, rtol=0, atol=1e-6)
    expected = goes_on(own, words, tmp_path)
    whole, about = open_source(str(own))
    assert (len(expected), about["step"], whole.step) == (END - HALF + 1, END, END)
    for to in ("single", "zero2", "forgotten"):
        ranks: dict[str, Any] = {"ranks": 2, "deepspeed_config": zero_json(to)} if to == "zero2" else {}
        train(tmp_path / to, words, **{**SETTINGS, **GOES_ON, "max_iters": END, "init_from": "resume", **ranks})
        found = losses(tmp_path / to)
        assert list(found) == list(range(HALF, END))
        difference = max(abs(loss - expected[step - HALF].item()) for step, loss in found.items())
        if to == "forgotten":
            assert difference > 1e-3, "AdamW's state makes no difference: this test shows nothing"
            continue
        assert difference <= 2e-6, to  # of losses of 4.9, whose last bit is 4.8e-7
        newest, about = Checkpoints(str(tmp_path / to)).newest()
        ours = open_state(newest, about)
        assert (about["strategy"], about["world_size"], ours.step) == (to, ranks.get("ranks", 1), END)
        for name, kind in ours.pieces:
            of_theirs, of_ours = whole.whole(name, kind), ours.whole(name, kind)
            assert (of_ours - of_theirs).norm() <= 1e-6 * of_theirs.norm(), f"{to}: {kind} of {name}"
