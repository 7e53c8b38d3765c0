"""What a user gets wrong ends in one message with the value, the rule and the fix, status 2, and nothing lost."""

import shutil
import subprocess
from typing import Any

import pytest

from tests.running import TINY, message, refused, run, train
from training.checkpoint import Checkpoints

CONFIG = {
    "unknown.py": "batch_size = 4\nn_heads = 2\n",
    "type.py": "batch_size = 'four'\n",
    "syntax.py": "batch_size = 4\nn_head = = 2\n",
    "raises.py": "batch_size = 4\nn_embd = 64 // 0\n",
}
SETTINGS = {
    "an unknown key in a file": (["{}/unknown.py"], "n_heads = 2 ({}/unknown.py:2): unknown key; did you mean n_head?"),
    "an unknown key": (["--batchsize=8"], "batchsize = '8' (command line): unknown key; did you mean batch_size?"),
    "a wrong type in a file": (["{}/type.py"], "batch_size = 'four' ({}/type.py:1): must be a whole number (int)"),
    "a wrong type": (["--batch_size=4.5"], "batch_size = '4.5' (command line): must be a whole number (int)"),
    "no value": (["--batch_size"], "--batch_size (command line): has no value; write --batch_size=VALUE"),
    "no such file": (["{}/sintax.py"], "{0}/sintax.py: no such config file; did you mean {0}/syntax.py?"),
    "a syntax error": (["{}/syntax.py"], "{}/syntax.py:2: invalid syntax"),
    "an error in a file": (["{}/raises.py"], "{}/raises.py:2: ZeroDivisionError: integer division or modulo by zero"),
    "heads": (["--n_embd=66", "--n_head=4"], "n_embd = 66 (command line): must be divisible by n_head = 4; set 64"),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, text in CONFIG.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(configs, case):
    arguments, expected = SETTINGS[case]
    done = run("train.py", *(a.format(configs) for a in arguments))
    assert message(done) == f"1 problem in the settings\n  {expected.format(configs)}"


def test_several_problems_are_told_at_once(configs):
    told = message(run("train.py", f"{configs}/unknown.py", "--dropout=2", "--max_iters=many", "--seed"))
    assert told.startswith("4 problems in the settings\n")
    assert all(key in told for key in ("n_heads = 2", "dropout = ", "max_iters = 'many'", "--seed (command line)"))


def test_accumulation_that_the_ranks_cannot_share(tmp_path, data):
    told = refused(tmp_path, data, ranks=2, gradient_accumulation_steps=3)
    rule = "must be divisible by the number of ranks, 2; set 2 or 4"
    assert told.endswith(f"gradient_accumulation_steps = 3 (command line): {rule}")


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"device": "cuda:7"}, "device = 'cuda:7': 0 GPUs are visible; use fewer ranks, or --device=cpu"),
        ({"device": "tpu"}, "device = 'tpu': unknown; write auto, cpu, cuda, cuda:1 or mps"),
        ({"device": "mps"}, "device = 'mps': not available on this machine; use --device=cpu"),
        ({"backend": "nccl"}, "backend = 'nccl': needs GPUs, this run is on cpu; set --backend=auto"),
    ],
)
def test_what_the_machine_lacks(tmp_path, data, settings, told):
    env = {"CUDA_VISIBLE_DEVICES": ""}
    ranks = 2 if "backend" in settings else 0
    tiny = {**TINY, "gradient_accumulation_steps": 2, "dataset": data, "out_dir": tmp_path, **settings}
    assert message(run("train.py", ranks=ranks, env=env, **tiny)) == told


def test_resume_without_a_checkpoint(tmp_path, data):
    fix = "start with --init_from=scratch, or set --out_dir to the run's folder"
    told = refused(tmp_path, data, ranks=2, gradient_accumulation_steps=2, init_from="resume")
    assert told == f"init_from = 'resume': {tmp_path} has no checkpoint; {fix}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    out_dir = tmp_path_factory.mktemp("runs") / "finished"
    train(out_dir, data, eval_interval=15)
    return out_dir


def test_a_truncated_checkpoint_is_named_and_the_one_before_offered(tmp_path, data, finished):
    copy = shutil.copytree(finished, tmp_path / "copy")
    newest = copy / "checkpoints" / "step_000030"
    size = (newest / "model.pt").stat().st_size
    with (newest / "model.pt").open("r+b") as file:
        file.truncate(size // 2)
    told = refused(copy, data, ranks=2, gradient_accumulation_steps=2, init_from="resume")
    what = f"model.pt has {size // 2:,} of {size:,} bytes"
    assert told == f"{newest} is damaged: {what}; remove that folder to resume from the one before, if there is one"
    shutil.rmtree(newest)
    assert "step_000015" in train(copy, data, init_from="resume")


def test_bytes_that_rotted_in_a_checkpoint(tmp_path, data, finished):
    copy = shutil.copytree(finished, tmp_path / "copy")
    path = copy / "checkpoints" / "step_000030" / "model.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a single bit, of a weight
    path.write_bytes(content)
    for ranks in (0, 2):
        told = refused(copy, data, ranks=ranks, gradient_accumulation_steps=2, init_from="resume")
        assert told.startswith(f"{path.parent} is damaged: model.pt does not match its checksum (CRC-32 ")
        assert told.endswith("; remove that folder to resume from the one before, if there is one")


def test_resume_with_another_shape(data, finished):
    told = refused(finished, data, init_from="resume", n_layer=3, block_size=16)
    folder = finished / "checkpoints" / "step_000030"
    assert told == f"{folder} is of another model; resume it with --block_size=32 (not 16), --n_layer=2 (not 3)"
    assert Checkpoints(str(finished)).newest()[0] == folder


@pytest.fixture
def small_disk(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_disk_that_gets_full_leaves_what_was_saved(small_disk, data, ranks):
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_interval": 5}
    told = refused(small_disk, data, ranks=ranks, **settings)
    whole = Checkpoints(str(small_disk)).intact()
    assert whole and Checkpoints(str(small_disk)).newest()[0] == whole[-1]
    kept = f"(--init_from=resume continues from {whole[-1]})"
    assert "No space left on device; free some space or choose another --out_dir" in told and told.endswith(kept)


def test_a_disk_that_became_read_only(small_disk, data):
    train(small_disk, data, eval_interval=30)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    told = refused(small_disk, data, init_from="resume", max_iters=40)
    assert told.startswith(str(small_disk))
    assert told.endswith(": Read-only file system; free some space or choose another --out_dir")
    assert Checkpoints(str(small_disk)).newest()[1]["step"] == 30


def test_another_vocabulary_than_the_checkpoints(finished, make_data):
    other = make_data([i % 50 for i in range(400)], vocab_size=50)
    told = refused(finished, other, init_from="resume")
    folder = finished / "checkpoints" / "step_000030"
    rule = f"trained with tokenizer 'byte' (257 ids), which is not that of dataset = '{other}' ('char', 50 ids)"
    assert told == f"{folder} was {rule}; use the run's own data set"


def test_data_that_is_not_there_or_too_short(tmp_path, data, make_data):
    told = refused(tmp_path, tmp_path / "none", ranks=2, gradient_accumulation_steps=2)
    assert told.startswith(f"there is no data set {tmp_path / 'none'}") and "python data/text/prepare.py" in told
    short = make_data(range(32))
    told = refused(tmp_path, short, ranks=2, gradient_accumulation_steps=2)
    assert told.startswith(f"{short}/train.bin has 32 tokens: too few for block_size = 32, which needs one more")
    assert not list(tmp_path.glob("checkpoints")), "something was written before the data was looked at"
