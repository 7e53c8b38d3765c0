"""The commands of README.md, CONTRIBUTING.md and docs/: each is checked, and each program is run once, on a tiny model.

A line of a ```sh block is a command. Checked: its script and config files exist, its settings parse on its number of
ranks, and the program knows its options. Run: the first command of each program, with sizes cut down.
"""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import hosts
from tests.running import ROOT, TINY, command, rows, run, start_process, train
from training.config import PlainTrainConfig, parse
from training.deepspeed_config import DeepSpeedTrainConfig
from training.errors import ConfigError
from training.strategies import strategies

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCKS = {page: re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S) for page in PAGES}
LINES = [re.split(" +# ", line)[0] for blocks in BLOCKS.values() for block in blocks for line in block.splitlines()]
COMMANDS = sorted(set(LINES))
EXAMPLE = "tests/hf_trainer.py"
CONFIGS: dict[str, Any] = {"train.py": PlainTrainConfig, "train_deepspeed.py": DeepSpeedTrainConfig}
SHORT: dict[str, Any] = {key: TINY[key] for key in ("device", "compile", "block_size", "batch_size", "eval_iters")}
SHORT |= {"n_layer": 1, "n_head": 2, "n_embd": 16, "max_iters": 2, "gradient_accumulation_steps": 8}
MODULES = {"torchrun": ["-m", "torch.distributed.run"], "deepspeed": ["-m", "deepspeed.launcher.runner"]}
ALWAYS_RUN = ("python -m tools.convert out-gpt2 ", "python -m tools.plan")  # cheap, and each of their options matters
TESTED_ELSEWHERE = (
    "-m tools.accept",
    "-m tools.benchmark",
    "-m tools.doctor",
    "-m tools.evaluate",
    EXAMPLE,
)  # each by real runs, in a file of its own


class Line:
    """A command, split.

    hostfile: whether it runs on the hosts of a hostfile; launcher: what starts the ranks, as words; script: a path or
    "-m module"; words: the script's arguments; ranks: 0 if not given.
    """

    def __init__(self, line: str):
        first, *words = [word for word in shlex.split(line) if not word.startswith(("HOSTFILE=", "NANOGPT="))]
        self.hostfile = line.startswith("HOSTFILE=") or "--hostfile=" in line
        self.launcher = [] if first == "python" else [first]
        if first == "python" and words[:1] == ["-m"] and words[1].startswith("launch."):
            self.launcher, words = words[:2], words[2:]
        self.launcher_options = []
        is_launch_script = first.startswith("./launch_")
        while self.launcher and words and not is_launch_script and (words[0].startswith("--") or words[0].isdigit()):
            self.launcher_options.append(words.pop(0))
        if is_launch_script:
            self.script = "train_deepspeed.py" if "deepspeed" in first else "train.py"
            options = ("--restarts=", "--ssh=")
            self.launcher_options = [word for word in words if word.isdigit() or word.startswith(options)]
            words = [word for word in words if word not in self.launcher_options]
            words += ["--strategy=fsdp"] if "fsdp" in first else []
            if not any(word.endswith(".py") for word in words):
                words.insert(0, f"config/train_gpt2_{Path(first).stem.removeprefix('launch_')}.py")
                words[0] = words[0].replace("_traditional_ddp", "").replace("gpt2_quickstart", "quickstart")
        else:
            self.script = " ".join(words[: 2 if words[:1] == ["-m"] else 1])
            words = words[len(self.script.split()) :]
        self.words = words
        counts = re.findall(r"(?:^|nproc_per_node=|num_gpus=)(\d+)$", "\n".join(self.launcher_options), re.M)
        self.ranks = int(counts[0]) if counts else 0

    def program(self) -> str:
        return " ".join([*self.launcher, self.script] if self.launcher else ["python", self.script])


def test_the_lines_are_taken_apart():
    line = Line('HOSTFILE=h ./launch_fsdp.sh --ssh="ssh -p 2" config/x.py --shard_ranks=8')
    assert line.launcher_options == ["--ssh=ssh -p 2"]
    assert line.words == ["config/x.py", "--shard_ranks=8", "--strategy=fsdp"]
    line = Line("torchrun --standalone --nproc_per_node=8 train.py config/x.py")
    assert (line.ranks, line.script, line.words) == (8, "train.py", ["config/x.py"])
    line = Line("python -m launch.ranks 8 -m tools.all_reduce")
    assert (line.ranks, line.script) == (8, "-m tools.all_reduce")


@functools.cache
def help_text(program: str) -> str:
    done = run(*program.split(), "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def ranks_of_hostfile(folder: Path) -> int:
    """The ranks of a command on the hosts of the hostfile in docs/multi_node.md."""
    [lines] = re.findall(r"^```\n(worker.*?)^```", (ROOT / "docs" / "multi_node.md").read_text(), re.M | re.S)
    (folder / "hostfile").write_text(lines)
    return sum(hosts.read_hostfile(str(folder / "hostfile")).values())


@pytest.mark.parametrize("text", COMMANDS)
def test_command_is_valid(text, monkeypatch, tmp_path):
    line = Line(text)
    if line.script in CONFIGS:
        monkeypatch.setenv("WORLD_SIZE", str(ranks_of_hostfile(tmp_path) if line.hostfile else line.ranks or 1))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(8 if line.hostfile else line.ranks or 1))
        parse(CONFIGS[line.script], line.words, "")
        if line.launcher and line.launcher[0].startswith("./"):
            assert (ROOT / line.launcher[0]).is_file()
    elif line.launcher == ["./run_tests.sh"] or line.launcher == ["./launch_quickstart.sh"]:
        pass  # run by CI, and by tests/test_setup.py
    else:
        options = [word.split("=")[0] for word in line.words if word.startswith("--")]
        known = help_text(line.script).replace("-", "_") + "".join(f"__{key} " for key in vars(DeepSpeedTrainConfig()))
        unknown = [option for option in options if not re.search(option.replace("-", "_") + r"\b", known)]
        assert not unknown, f"{line.script} has no {unknown}"
    if line.launcher[:1] == ["-m"]:
        known = help_text(" ".join(line.launcher))
        assert all(word.isdigit() or word.split("=")[0] in known for word in line.launcher_options)


def commands_to_run() -> list[Any]:
    """The first command of each program, except what downloads, needs several machines, or has tests of its own."""
    candidates = [text for text in COMMANDS if not re.search("run_tests|quickstart|prepare.py|resume|node_rank", text)]
    candidates = [text for text in candidates if not Line(text).hostfile and Line(text).script not in TESTED_ELSEWHERE]
    first = {Line(text).program(): text for text in reversed(candidates)}
    if "deepspeed train_deepspeed.py" in first:  # torchrun is run with train.py
        first.pop("torchrun train_deepspeed.py", None)
    texts = sorted({*first.values(), *(text for text in COMMANDS if text.startswith(ALWAYS_RUN))})
    return [pytest.param(text, marks=pytest.mark.needs("libaio") if "nvme" in text else ()) for text in texts]


@pytest.fixture
def trained(once, data) -> Path:
    return once("trained", lambda folder: train(folder, data, **{**SHORT, "max_iters": 1}))


def small(line: Line, data: Path, folder: Path, trained: Path) -> list[str]:
    """The arguments of a command for a tiny model; without what downloads, all else as it is."""
    tiny = [f"--{k}={v}" for k, v in {**SHORT, "dataset": data, "out_dir": folder / "out"}.items()]
    words = [word for word in line.words if not word.startswith(("--init_from=gpt2", "--dataset=", "--wandb_log"))]
    if line.script == "-m tools.plan":
        return [re.sub("^--curve=", f"--curve={folder}/", word) for word in words]
    if line.script == "-m tools.convert":
        return [str(trained), str(folder / words[1]), *words[2:]]
    if line.script == "-m tools.plot":
        return [str(trained), f"--output={folder}/loss.png", *(word for word in words if word.startswith("--x="))]
    if line.script == "sample.py":
        return [f"--out_dir={trained}", "--max_new_tokens=5", *(word for word in words if "out_dir" not in word)]
    if line.script in CONFIGS:
        words = [re.sub("^--nvme_path=.*", f"--nvme_path={folder}", word) for word in words]
        words = [re.sub("^--steps=.*", "--steps=5", word) for word in words]
        return [*words, *tiny, *(["--init_from=scratch"] if any("finetune" in word for word in words) else [])]
    return words


@pytest.mark.parametrize("text", commands_to_run())
def test_command_runs(text, data, tmp_path, trained):
    line = Line(text)
    arguments = small(line, data, tmp_path, trained)
    options = [re.sub("(?<![0-9])(8|4)$", "2", word) for word in line.launcher_options]
    if line.launcher and line.launcher[0].startswith("./"):
        # The scripts for DeepSpeed differ in one word; the first one starts two ranks, each of which imports it anew.
        call = [line.launcher[0], "1" if re.search("zero[1-3]", line.launcher[0]) else "2", *arguments]
    else:
        launcher = MODULES.get(" ".join(line.launcher), line.launcher)
        call = [sys.executable, *launcher, *options, *line.script.split(), *arguments]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start_process(call, cwd=ROOT, env=env, text=True, **pipes) as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def test_files_that_the_pages_name_exist():
    for page in PAGES:
        text = (ROOT / page).read_text()
        named = re.findall(r"`((?:config|data|deepspeed_configs|docs|launch|tests|tools|training)/[\w/.]+\w)`", text)
        linked = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
        for path in [*(ROOT / name for name in named), *((ROOT / page).parent / name for name in linked)]:
            assert path.exists(), f"{page} names {path}"


def test_links_to_sections_have_their_section():
    for page in PAGES:
        for name, section in re.findall(r"\]\(([^)#]*)#([^)]+)\)", (ROOT / page).read_text()):
            text = ((ROOT / page).parent / name if name else ROOT / page).read_text()
            titles = [re.sub(r"[^\w -]", "", title.lower()) for title in re.findall("^#+ (.*)", text, re.M)]
            assert section.replace("-", " ") in titles, f"{page}: {name}#{section}"


def test_the_error_in_the_readme_is_the_real_one():
    text = (ROOT / "README.md").read_text()
    line, expected = re.findall(r"^\$ (python train.*)\n((?:.+\n)+?)```", text, re.M)[0]
    done = subprocess.run([command("")[0], *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, expected)


@pytest.mark.parametrize("number", range(4))
def test_messages_in_troubleshooting_are_the_real_ones(number, monkeypatch):
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `((\w+) = '?(\w+)'? \((.*?)(?::\d+)?\): .*)` \|", text, re.M)
    assert len(quoted) == 4
    message, key, value, place = quoted[number]
    words = [f"--{key}={value}"] if place == "command line" else [place]
    monkeypatch.setenv("WORLD_SIZE", re.sub(r".*number of ranks, (\d).*|.*", r"\1", message) or "1")
    monkeypatch.chdir(ROOT)
    extra = ["--strategy=fsdp", "--gradient_accumulation_steps=3"] if key == "shard_ranks" else []
    with pytest.raises(ConfigError) as error:
        parse(PlainTrainConfig, [*words, *extra], "")
    assert f"  {message}" in str(error.value).splitlines()


def test_the_quickstart_in_the_readme_is_the_committed_run():
    text = (ROOT / "README.md").read_text()
    steps = {row["step"]: row for row in rows(ROOT / "results" / "quickstart", "train")}
    quoted = re.findall(r"^step +([\d,]+)/.* loss ([\d.]+) lr .* ([\d.]+) ms +([\d,]+) tok/s", text, re.M)
    assert len(quoted) > 2
    for step, loss, milliseconds, rate in quoted:
        row = steps[int(step.replace(",", ""))]
        assert (loss, milliseconds) == (f"{row['loss']:.4f}", f"{row['step_ms']:.1f}")
        assert rate == f"{row['tokens_per_second']:,.0f}"
    evaluations = {row["step"]: row for row in rows(ROOT / "results" / "quickstart", "eval")}
    for step, train_loss, val_loss in re.findall(
        r"^step +([\d,]+)/.* train loss ([\d.]+) val loss ([\d.]+)$", text, re.M
    ):
        row = evaluations[int(step.replace(",", ""))]
        assert (train_loss, val_loss) == (f"{row['train_loss']:.4f}", f"{row['val_loss']:.4f}")


def test_the_readme_is_short_and_has_every_file_of_the_core():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 220
    missing = [path.name for path in (ROOT / "training").glob("*.py") if path.name not in text]
    assert not missing, f"the tree in README.md lacks {missing}"
    tools = ("plan", "benchmark", "doctor", "convert", "evaluate", "plot")
    assert all(f"`python -m tools.{name}`" in text for name in tools)


def test_the_table_of_strategies_is_the_code_s():
    table = re.findall(r"^\| (\w+) \|.*\| `([^`]+)` \|$", (ROOT / "README.md").read_text(), re.M)
    launchers = {name: line.split() for name, line in table if name in strategies()}
    assert launchers.keys() == strategies().keys()
    for name, strategy in strategies().items():
        assert launchers[name][:1] == strategy.launcher.split()[:1], name
