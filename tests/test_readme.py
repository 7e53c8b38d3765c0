"""The commands of README.md, CONTRIBUTING.md and docs/, each run for real: a few steps of a tiny model, not days."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT, TINY, command, train
from tests.test_plan_command import MACHINE

PAGES = ["README.md", "CONTRIBUTING.md", "docs/from_ddp.md", "docs/from_fsdp.md"]
COMMANDS = sorted(
    {
        line.split("  #")[0].split(" # ")[0].strip()
        for page in PAGES
        for block in re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
        for line in block.splitlines()
    }
)
EXAMPLE = "examples/hf_trainer.py"
SHORT: dict[str, Any] = {key: TINY[key] for key in ("device", "compile", "block_size", "batch_size", "eval_iters")}
SHORT |= {"n_layer": 1, "n_head": 2, "n_embd": 16, "max_iters": 2, "gradient_accumulation_steps": 8}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> Path:
    out_dir = tmp_path_factory.mktemp("runs") / "trained"
    train(out_dir, data, **{**SHORT, "max_iters": 1})
    return out_dir


def shrunk(words: list[str], data: Path, out_dir: Path, trained: Path) -> list[str]:
    """The command on a small data set, and without what downloads; all else as it is."""
    words = [word for word in words if not word.startswith(("--init_from=gpt2", "--dataset=", "--wandb_log"))]
    tiny = [f"--{k}={v}" for k, v in {**SHORT, "dataset": data, "out_dir": out_dir}.items()]
    if "--init_from=resume" in words:
        tiny[-1] = f"--out_dir={trained}"
    return [*words, *tiny, *(["--init_from=scratch"] if "finetune" in " ".join(words) else [])]


def planned(words: list[str], folder: Path) -> list[str]:
    """The files of plan.py in a folder, with that of a machine."""
    if any(word.startswith("--machine=") for word in words):
        MACHINE.write(folder / "machine.json")
    words = ["--help" if word.startswith("--calibrate=") else word for word in words]  # test_plan_command.py measures
    return [re.sub("^(--curve|--calibrate|--machine)=", rf"\1={folder}/", word) for word in words]


def of_script(script: str, words: list[str], data: Path, folder: Path, trained: Path) -> list[str]:
    """The arguments of a Python script of the root, for a small model; none for one that is unknown."""
    if script == "plan.py":
        return planned(words, folder)
    if script == "convert.py":
        return [str(trained), str(folder / words[1]), *words[2:]]
    if script == "benchmark.py":
        large = ("--write", "--rounds", "--ranks", "--gpus", "--nvme_path")
        words = [re.sub("^--steps=.*", "--steps=5", word) for word in words if not word.startswith(large)]
        words = [re.sub("^(--strategies=[^,]*,).*", r"\1zero3", word) for word in words]
        return [*words, *(f"--{k}={v}" for k, v in {**SHORT, "dataset": data}.items())]
    if script in ("train.py", "doctor.py"):
        return shrunk(words, data, folder / "out", trained)
    words = [word for word in words if not word.startswith(("--init_from", "--out_dir", "out-"))]
    if script == "sample.py":
        return [*words, f"--out_dir={trained}", "--max_new_tokens=5"]
    return [*words, str(trained)] if script == "plot.py" else []


def by_trainer(words: list[str], data: Path, out_dir: Path) -> list[str]:
    """The command of the Hugging Face Trainer's example, on 2 ranks."""
    words = [re.sub("^8$", "2", word) for word in words if not word.startswith(("--model=", "--dataset="))]
    tiny = {"dataset": data, "output_dir": out_dir, "max_steps": 2, "logging_steps": 1, "n_layer": 1}
    return [*words, *(f"--{k}={v}" for k, v in {**tiny, "n_head": 2, "n_embd": 16, "block_size": 32}.items())]


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line, data, tmp_path, trained):
    first, *words = shlex.split(line)
    python, env = command("")[0], {**os.environ, "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
    script = words[0] if first == "python" else first
    if first in ("./run_tests.sh", "./launch_quickstart.sh") or "--help" in words:  # tests of their own; CI runs them
        arguments = [*([python] if first == "python" else []), *([script] if first == "python" else [first]), "--help"]
    elif "prepare.py" in script:
        options = subprocess.run(
            [python, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert all(word.split("=")[0] in options for word in words if word.startswith("--"))
        arguments = [python, script, "--help"]
    elif first == "torchrun":
        arguments = [python, "-m", "torch.distributed.run", *shrunk(words, data, tmp_path / "out", trained)]
    elif EXAMPLE in words:
        start = [python, "-m", "deepspeed.launcher.runner"] if first == "deepspeed" else [python]
        arguments = [*start, *by_trainer(words, data, tmp_path / "out")]
    elif first == "deepspeed":
        arguments = [python, "-m", "deepspeed.launcher.runner", *shrunk(words, data, tmp_path / "out", trained)]
    elif first.startswith(("./launch_traditional_ddp", "./launch_fsdp", "./launch_deepspeed_")):
        words = [word if not word.startswith("--nvme_path") else f"--nvme_path={tmp_path}" for word in words]
        arguments = [first, *shrunk(["2", *words[1:]], data, tmp_path / "out", trained)]
    elif of_ours := of_script(script, words[1:], data, tmp_path, trained):
        arguments = [python, script, *of_ours]
    else:
        pytest.fail(f"a command that this test does not know: {line}")
    arguments = [re.sub("^(--nproc_per_node|--num_gpus)=8$", r"\1=2", word) for word in arguments]
    done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_files_that_the_pages_name_are_there():
    for page in PAGES:
        text = (ROOT / page).read_text()
        named = re.findall(r"`((?:config|data|deepspeed_configs|training|tests)/[\w/.]+)`", text)
        linked = re.findall(r"\]\(([^)#]+)\)", text)
        for path in [*(ROOT / name for name in named), *((ROOT / page).parent / name for name in linked)]:
            assert path.exists(), f"{page} names {path}"


def test_the_error_in_the_readme_is_the_real_one():
    text = (ROOT / "README.md").read_text()
    line, expected = re.findall(r"^\$ (python train.*)\n((?:.+\n)+?)```", text, re.M)[0]
    done = subprocess.run([command("")[0], *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, expected)
