"""The architecture: who imports whom, budgets of lines, messages in asserts, settings that are used."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from model import GPTConfig
from sample import SampleConfig
from tests.running import ROOT, TINY
from training.config import PlainTrainConfig

FOLDERS = ("config", "data", "launch", "tests", "tools", "training")
PATHS = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
FILES = sorted(path.relative_to(ROOT) for path in PATHS)
SCRIPTS = {path.stem for path in FILES if path.parent == Path()} - {"model"}
OUTSIDE = ("tests", "data", "launch", "tools")  # these start ranks, or know nothing of them
LINES = {"train.py": 180, "train_deepspeed.py": 180, "model.py": 400}
LINES_PER_FILE, LINES_PER_FUNCTION = 400, 40
# script: (files, lines) of this repository that one run of it imports
IMPORTED = {"train.py": (22, 3000), "train_deepspeed.py": (27, 3600)}
ALL_LINES = 9500  # of Python, shell and JSON outside tests, results and docs
README_LINES = 220
BUILDERS = (
    "train_deepspeed.py",
    "hf_trainer.py",
    "bare_loop.py",
    "deepspeed_muon.py",
    "deepspeed_pipeline.py",
)  # others start no engine and wrap no model
BASE = {"config", "distributed", "errors", "parallel"}  # of training/: they import none of the rest of it


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


assert len(FILES) > 20, "too few files: these tests would test nothing"


def test_the_model_imports_torch_only():
    roots = {name.split(".")[0] for name in imports(Path("model.py"))}
    assert roots - set(sys.stdlib_module_names) == {"torch"}


def test_imports_go_one_way():
    for path in FILES:
        names = imports(path)
        roots = {name.split(".")[0] for name in names}
        if path.parts[0] != "tests":
            assert not roots & SCRIPTS, f"{path} imports a script"
            assert "deepspeed" not in roots or path.name in BUILDERS, path
        if path.parts[0] in ("data", "model.py"):
            assert not roots & {"training", "launch", "tools"}, f"{path} imports what is above it"
        if path.parts[0] in ("training", "train.py", "train_deepspeed.py", "sample.py"):
            assert not roots & {"launch", "tools"}, f"{path} imports what is above it"
        if path.parts[0] == "launch":
            assert roots - set(sys.stdlib_module_names) <= {"launch", "training", "data"}, path
    for path in FILES:
        if path.parts[0] == "training":
            assert "training.loop" not in imports(path), f"{path}: the loop is above the rest of training/"
    for name in BASE:
        below = {found.split(".")[1] for found in imports(Path(f"training/{name}.py")) if found.startswith("training.")}
        assert below <= BASE, f"training/{name}.py imports {below - BASE}, which are above it"


def test_strategies_are_named_in_the_train_script_only():
    for path in FILES:
        if path.parts[0] not in ("tests", "train.py") and path.name not in BUILDERS:
            names = {name.split(".")[-1] for name in imports(path)}
            assert not names & {"DistributedDataParallel", "fully_shard", "FullyShardedDataParallel"}, path


def test_the_launchers_variables_are_read_in_one_file():
    readers = {
        path.as_posix()
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and path.parts[0] not in OUTSIDE
    }
    assert readers == {"training/distributed.py", "training/deepspeed_engine.py"}  # the latter sets the linker's path


@pytest.mark.parametrize("path", FILES, ids=str)
def test_asserts_have_messages(path):
    if path.parts[0] != "tests":
        mute = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert) and node.msg is None]
        assert not mute, f"{path}: lines {mute}"


def settings_read(source: ast.AST, name: str) -> set[str]:
    """The keys read as NAME.key or self.NAME.key."""
    nodes = [n for n in ast.walk(source) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    return {
        n.attr
        for n in nodes
        if (n.value.attr if isinstance(n.value, ast.Attribute) else getattr(n.value, "id", "")) == name
    }


@pytest.mark.parametrize(
    "config, files", [(PlainTrainConfig, ["train.py", "train_deepspeed.py", "training"]), (SampleConfig, ["sample.py"])]
)
def test_every_key_is_used(config, files):
    read = set().union(*(settings_read(tree(path), "cfg") for path in FILES if path.parts[0] in files))
    read |= {field.name for field in dataclasses.fields(GPTConfig)}  # TrainConfig.model_config passes them on by name
    assert {field.name for field in dataclasses.fields(config)} - read == set()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short(path):
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= LINES.get(path.as_posix(), LINES_PER_FILE)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno and node.end_lineno - node.lineno < LINES_PER_FUNCTION, f"{path}: {node.name}"


def test_the_whole_is_short():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    counted = [
        n for n in names if not n.startswith(("tests/", "results/", "docs/")) and n.endswith((".py", ".sh", ".json"))
    ]
    assert sum(len((ROOT / name).read_text().splitlines()) for name in counted if (ROOT / name).is_file()) <= ALL_LINES
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


IMPORTS_OF_A_RUN = """
import os, runpy, sys
root, script = os.getcwd(), sys.argv[1]
sys.argv = sys.argv[1:]
sys.path.insert(0, root)
os._exit = sys.exit
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
files = {os.path.relpath(file, root) for file in files if file.startswith(root)} | {script}
print(*sorted(file for file in files if "site-packages" not in file), sep="\\n")
assert "torch._dynamo" not in sys.modules, "a run without --compile loaded torch's compiler"
"""


@pytest.mark.parametrize("script", IMPORTED)
def test_a_run_imports_few_files(tmp_path, data, script):
    settings = {**TINY, "dataset": data, "out_dir": tmp_path, "max_iters": 3}
    arguments = [script, *(f"--{key}={value}" for key, value in settings.items())]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_OF_A_RUN, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [line for line in done.stdout.splitlines() if line.endswith(".py")]
    lines = sum(len((ROOT / file).read_text().splitlines()) for file in files)
    assert script in files and "training/loop.py" in files
    assert len(files) <= IMPORTED[script][0] and lines <= IMPORTED[script][1], f"{len(files)} files, {lines} lines"
