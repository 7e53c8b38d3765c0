"""Four widespread guides to DeepSpeed: every command line, JSON block and checklist item of theirs, at tiny size.

They migrate from DDP (below: DDP) and from FSDP (FSDP), add DeepSpeed to nanoGPT (nanoGPT), and are a short reference
(reference). tests/guides.txt lists what they tell their readers to write, word for word, and what comes of it here: it
works, unless lines with "!" follow; a refusal has these words. `python -m tests.test_guides` prints it as a table.
"""

import ast
import functools
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from launch import hosts
from launch.ranks import free_port
from tests.running import ROOT, TINY, difference, losses, message, rows, run, zero_json
from tests.test_deepspeed_config import CUDA, literal
from tests.test_readme import CONFIGS, Line, commands_to_run
from training.config import parse
from training.deepspeed_config import check_values, dotted
from training.deepspeed_json import COMMENT
from training.distributed import SINGLE_PROCESS
from training.errors import ConfigError

GUIDES = ROOT.parent / "shared" / "seeds"  # the documents; not part of the repository

# A paragraph is GUIDE: SECTION, then "$" a command, "{" a JSON, or "-" an item and "=>" how it is checked. "!" precedes
# words of a refusal, of a command, or of a JSON on 2 CPU ranks (the guides have 8 GPUs); "!!": on 8 GPUs, too. A JSON
# of a section with "*" is trained with, after what the refusals say was done.
LIST = (ROOT / "tests" / "guides.txt").read_text()


@dataclass
class Row:
    guides: str
    section: str
    kind: str  # $ command, { JSON, - item
    text: str
    check: str = ""  # of an item; of a command a remark
    refusals: list[str] = field(default_factory=list)

    def words(self, mark: str = "!") -> list[str]:
        return [line.lstrip("! ") for line in self.refusals if line.startswith(mark)]


def read_list() -> list[Row]:
    found: list[Row] = []
    for paragraph in LIST.strip().split("\n\n"):
        head, *lines = paragraph.splitlines()
        guides, section = head.split(": ", 1)
        for line in lines:
            if line.startswith(" "):
                found[-1].text += line
            elif line.startswith("!"):
                found[-1].refusals.append(line)
            else:
                text, _, check = line.lstrip("$- ").partition(" => ")
                found.append(Row(guides, section, line[0], text, check))
    return found


ROWS = read_list()
JSONS = [row for row in ROWS if row.kind == "{"]
COMMANDS = {row.text: row for row in ROWS if row.kind == "$"}
LAUNCHES = [text for text in COMMANDS if "train.py" in text and "ds_config" not in text]
OF_README = [text for text in COMMANDS if re.match(r"\./launch|deepspeed --num_gpus=8 train_deepspeed", text)]
SETTINGS = {**TINY, "max_iters": 3, "lr_decay_iters": 3, "warmup_iters": 1, "log_interval": 1}
LAUNCHERS = {"torchrun": ["torch.distributed.run", "--standalone"], "deepspeed": ["deepspeed.launcher.runner"]}


def shell(text: str, folder: Path) -> subprocess.CompletedProcess:
    """Run command lines in a folder as in the repository."""
    line = ["bash", "-c", re.sub(r"(?<![\w/])(train\w*\.py|config/)", rf"{ROOT}/\1", text)]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


class Runs:
    """Runs that several rows look at, each made once."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data = folder, data
        self.launched = functools.cache(self.launch)

    def settings(self, name: str, **given: Any) -> dict[str, Any]:
        own = {"dataset": self.data, "out_dir": self.folder / name, "gradient_accumulation_steps": 2}
        return {**SETTINGS, **own, **given}

    def launch(self, text: str) -> Path:
        """Run a launch line with 2 ranks and tiny settings; returns its run folder."""
        words = shlex.split(text.replace("=8 ", "=2 "))
        given = self.settings(f"launch {len(list(self.folder.iterdir()))}", steps=6)
        if "--benchmark" in words:  # the same line without it shows that the launcher works
            done = run(*words[2:], ranks=2, **given)
        else:
            port = [f"--master_port={free_port()}"] if words[0] == "deepspeed" else []
            done = run("-m", *LAUNCHERS[words[0]], *port, *words[1:], **given)
        assert done.returncode == 0, done.stderr
        return given["out_dir"]

    def deepspeed(self, name: str, **given: Any) -> Path:
        done = run("train_deepspeed.py", ranks=2, **self.settings(name, **given))
        assert done.returncode == 0, done.stderr
        return self.folder / name

    @functools.cached_property
    def ddp(self) -> Path:
        return self.launched("deepspeed --num_gpus=8 train.py")

    @functools.cached_property
    def zero2(self) -> Path:
        return self.deepspeed("zero2", deepspeed_config=zero_json("zero2"))

    @functools.cached_property
    def resumed(self) -> Path:
        shutil.copytree(self.zero2, self.folder / "resumed")
        return self.deepspeed("resumed", init_from="resume", max_iters=5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), data)


def repaired(config: dict[str, Any], problems: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The JSON, and words of a command line, after what the messages say was done."""
    config, words = json.loads(json.dumps(config)), []
    for problem in problems:
        words += [word.replace("=N", "=2") for word in re.findall(r"set (--activation\w+=\w+)", problem)]
        if steps := re.search(r'write "gradient_accumulation_steps": (\d+)', problem):
            config["gradient_accumulation_steps"] = int(steps[1])
        elif 'write "bf16"' in problem:
            config["bf16"] = {"enabled": config.pop("fp16")["enabled"]}
        elif "write AdamW" in problem:
            config |= {"communication_data_type": "bf16", "optimizer": {**config["optimizer"], "type": "AdamW"}}
        elif "set --nvme_path" in problem:
            words.append(f"--nvme_path={ROOT}")
        else:
            assert "remove it" in problem, problem
            *blocks, name = problem.split(":")[0].split(".")
            (dotted(config, ".".join(blocks)) if blocks else config).pop(name)
    return config, words


def problems_of(config: dict[str, Any], ranks: Any) -> list[str]:
    try:
        literal(config, ranks=ranks)
    except ConfigError as error:
        return str(error).splitlines()[1:]
    return []


@pytest.mark.parametrize("row", JSONS, ids=lambda row: row.text[:50])
def test_a_json_is_taken_as_it_is_or_refused_with_what_to_write(row):
    import deepspeed

    config, two_cpus = json.loads(row.text), replace(SINGLE_PROCESS, world_size=2)
    found = [problem.strip() for problem in problems_of(config, two_cpus)]
    assert len(found) == len(row.refusals), found
    assert all(any(words in problem for problem in found) for words in row.words()), found
    on_gpus = problems_of(config, replace(CUDA if "fp16" in config else SINGLE_PROCESS, world_size=8))
    assert len(on_gpus) == len(row.words("!!")), on_gpus
    config, words = repaired(config, found)
    _, resolved = literal(config, *words, ranks=two_cpus)
    assert '"auto"' not in json.dumps(resolved)
    resolved.pop("train_batch_size")  # DeepSpeed would check it for one rank
    check_values(resolved, deepspeed.DeepSpeedConfig, "ds.json")


@pytest.mark.parametrize("row", [row for row in JSONS if row.section.startswith("*")], ids=lambda row: row.text[:50])
def test_a_json_trains(row, runs, tmp_path):
    config, words = repaired(json.loads(row.text), row.words())
    assert not words
    (tmp_path / "ds.json").write_text(json.dumps(config))
    own = ("batch_size", "learning_rate", "gradient_accumulation_steps")
    given = runs.settings("", deepspeed_config=tmp_path / "ds.json", out_dir=tmp_path)
    done = run("train_deepspeed.py", ranks=2, **{name: given[name] for name in given if name not in own})
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path)) == 3 and all(map(math.isfinite, losses(tmp_path).values()))


@pytest.mark.parametrize("text", LAUNCHES)
def test_a_launch_line_trains(text, runs, reference):
    """To the losses of one process."""
    folder = runs.launched(text)
    if "--benchmark" in text:
        assert len(losses(folder)) == 6 and (folder / "speed.json").exists()
    else:
        one = {name: value for name, value in SETTINGS.items() if name not in TINY or TINY[name] != value}
        assert difference(reference(**one, gradient_accumulation_steps=2), folder) <= 1e-5
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2


@pytest.mark.parametrize("text", OF_README)
def test_a_launch_line_of_the_readme(text, monkeypatch):
    """tests/test_readme.py runs it, or another line of the same programs."""
    line = Line(text)
    assert line.program() in {Line(case.values[0]).program() for case in commands_to_run()}
    monkeypatch.setenv("WORLD_SIZE", str(line.ranks))
    assert line.ranks == 8 and parse(CONFIGS[line.script], line.words, "").max_iters == 600000


@pytest.mark.parametrize("text", [text for text in COMMANDS if "ds_config.json" in text and "hostfile" not in text])
def test_train_py_names_the_script_that_takes_a_json(text, tmp_path):
    [words] = COMMANDS[text].words()
    if "tee" in text:
        done = shell(text.replace("=4", "=2"), tmp_path)
        assert words in (tmp_path / "train.log").read_text() and "Traceback" not in done.stdout
    else:
        assert words in message(run(*text.split()[2:]))


@pytest.mark.needs("ssh-keygen")
@pytest.mark.parametrize("text", [text for text in COMMANDS if text.startswith("deepspeed --hostfile")])
def test_unknown_hosts(text, tmp_path):
    """DeepSpeed's launcher refuses them before anything of ours starts. tests/test_hosts.py launches on real hosts."""
    make = [line for line in COMMANDS if line.startswith("echo")]
    done = shell("\n".join([*make, "cp hostfile hostfile.txt", text]), tmp_path)
    [words] = COMMANDS[text].words()
    assert done.returncode == 1 and words in done.stderr
    assert words.partition("but ")[2].replace("node1", "HOST") in (ROOT / "docs" / "troubleshooting.md").read_text()


def test_programs_that_are_not_ours(tmp_path, runs):
    assert "deepspeed" in (ROOT / "requirements.txt").read_text()
    if importlib.util.find_spec("pip"):
        assert "already satisfied" in shell("python -m pip install --no-index --dry-run deepspeed", tmp_path).stdout
    assert "deepspeed install path" in shell("ds_report", tmp_path).stdout
    assert hosts.forwarded_environment({"NCCL_DEBUG": "INFO"}) == {"NCCL_DEBUG": "INFO"}
    *measure, compare = [text for text in COMMANDS if "_mem.txt" in text]
    for text, folder in zip(measure, (runs.ddp, runs.zero2), strict=True):
        if shutil.which("nvidia-smi"):
            assert shell(text, tmp_path).returncode == 0
        else:  # what the run itself needed, which docs/from_ddp.md names instead
            peak = max(row["peak_memory_bytes"] for row in rows(folder, "train"))
            (tmp_path / text.split()[-1]).write_text(f"{peak // 10**6}\n")
    assert re.match(r"GPU mem: DDP=\d+MB, DS=\d+MB, Reduction=-?[\d.]+%", shell(compare, tmp_path).stdout)


@pytest.mark.parametrize("row", [row for row in ROWS if row.kind == "-"], ids=lambda row: row.text)
def test_a_checklist_item(row, runs):
    kind, _, what = row.check.partition(" ")
    code, page = (ROOT / "train_deepspeed.py").read_text(), (ROOT / "docs" / "from_fsdp.md").read_text()
    if kind == "lacks":
        assert what not in code
    elif kind == "has":
        assert what in code
    elif kind == "page":
        assert what in page
    elif kind == "resolved":
        assert dotted(json.loads((runs.zero2 / "deepspeed.json").read_text()), what) is not None
    elif what == "losses match DDP":
        assert difference(runs.ddp, runs.zero2) <= 1e-5
    elif what == "benchmark":
        assert all((runs.launched(text) / "speed.json").exists() for text in LAUNCHES if "--benchmark" in text)
    elif what == "memory":
        assert all(row["peak_memory_bytes"] > 1e6 for row in rows(runs.zero2, "train"))
    elif what == "save and load":
        assert list(losses(runs.resumed)) == list(range(5))
    else:
        assert what == "launched by deepspeed" and any(text.startswith("deepspeed ") for text in OF_README)


@pytest.mark.skipif(not GUIDES.is_dir(), reason=f"the guides are not in {GUIDES}")
def test_the_list_misses_no_line_block_or_item():
    text = "\n".join(path.read_text() for path in sorted(GUIDES.glob("*.txt")))
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
    commands = [line for language, block in blocks if language == "bash" for line in block.splitlines()]
    missing = {line for line in commands if line and not line.startswith("#")} - COMMANDS.keys()
    items = {re.sub(r"\*\*", "", item) for item in re.findall(r"^ *- \[ \] (.*)$", text, re.M)}
    missing |= items - {row.text for row in ROWS if row.kind == "-"}
    known = [json.loads(row.text) for row in JSONS]
    for _, block in blocks:
        plain = COMMENT.sub(lambda match: match[1] or "", block)
        found = [json.loads(part) for part in re.findall(r"^\{\n.*?^\}", plain, re.M | re.S)]
        found += [ast.literal_eval(part) for part in re.findall(r"^config = (\{\n.*?^\})", block, re.M | re.S)]
        missing |= {json.dumps(config) for config in found if config not in known}
    spans = [json.loads(f"{{{span.replace(', ...', '')}}}") for span in re.findall(r'`("\w+": [^`\n]+)`', text)]
    pairs = [pair for config in known for pair in (*config.items(), *config.get("zero_optimization", {}).items())]
    assert len(known) > 30 and len(items) > 50 and len(spans) > 15
    assert not missing
    assert all(pair in pairs for span in spans for pair in span.items())


KINDS = {
    "lacks": "works: train_deepspeed.py has no",
    "has": "works: train_deepspeed.py has",
    "page": "works: docs/from_fsdp.md explains",
    "resolved": "works: in deepspeed.json of a run:",
    "ran": "works, by real runs:",
}


def outcome(row: Row) -> str:
    """What comes of a row, for the table."""
    kind, _, what = row.check.partition(" ")
    if row.kind == "-":
        return f"{KINDS[kind]} {what}"
    trained = "trained with" if row.section.startswith("*") else "accepted by our check and DeepSpeed's"
    if not row.refusals:
        return f"works: {trained}" if row.kind == "{" else f"works {row.check}".strip()
    where = "accepted for 8 GPUs; on 2 CPU ranks " if row.kind == "{" and not row.words("!!") else ""
    then = f"; then {trained}" if row.kind == "{" else ""
    return f"{where}refused: {'; '.join(row.words())}{then} {row.check}".strip()


if __name__ == "__main__":
    print("| guide | section | what it says | here |\n|---|---|---|---|")
    for row in ROWS:
        text = row.text.replace("|", "\\|").replace("`", "")
        print(f"| {row.guides} | {row.section.lstrip('*')} | `{text}` | {outcome(row)} |")
