"""What the code as a whole promises: who imports whom, messages in asserts, keys that are used, short files."""

import ast
import dataclasses
import sys
from pathlib import Path

import pytest

from sample import SampleConfig
from tests.running import ROOT
from training.sharding import PlainTrainConfig

FOLDERS = ("config", "data", "examples", "tests", "training")
FOUND = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
FILES = sorted(path.relative_to(ROOT) for path in FOUND)
SCRIPTS = {path.stem for path in FILES if path.parent == Path()} - {"model"}
OUTSIDE = (
    "tests",
    "data",
    "launch.py",
    "launch_hosts.py",
    "doctor.py",
)  # data/ and the launcher know nothing of ranks, or make them
LIMITS = {"train.py": 150, "train_deepspeed.py": 150, "training/loop.py": 90, "model.py": 300}
BASE = {"config", "train_config", "distributed", "errors"}  # of training/: they import none of the rest of it


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


def own(path: Path) -> list[Path]:
    """FILES of a folder; not the tests."""
    return [p for p in FILES if p.parts[0] == str(path)]


assert len(FILES) > 20, "too few files: these tests would test nothing"


def test_the_model_imports_torch_only():
    roots = {name.split(".")[0] for name in imports(Path("model.py"))}
    assert roots - set(sys.stdlib_module_names) == {"torch"}


def test_imports_go_one_way():
    for path in FILES:
        roots = {name.split(".")[0] for name in imports(path)}
        if path.parts[0] != "tests":
            assert not roots & SCRIPTS, f"{path} imports a script"
            assert "deepspeed" not in roots or path.name in ("train_deepspeed.py", "convert.py", "hf_trainer.py"), path
        if path.parts[0] == "data":
            assert not roots & {"training", "model", "torch"}, f"{path} imports what stands above it"
    loop = {path.as_posix() for path in own(Path("training")) if "training.loop" in imports(path)}
    assert not loop, "the loop stands above the rest of training/"
    for name in BASE:
        shared = {
            found.split(".")[1] for found in imports(Path(f"training/{name}.py")) if found.startswith("training.")
        }
        assert shared <= BASE, f"training/{name}.py imports {shared - BASE}, which stand above it"


def test_strategies_are_named_in_the_train_script_only():
    for path in FILES:
        if path.parts[0] not in ("tests", "train.py"):
            names = {name.split(".")[-1] for name in imports(path)}
            assert not names & {"DistributedDataParallel", "fully_shard", "FullyShardedDataParallel"}, path


def test_the_launchers_variables_are_read_in_one_file():
    readers = {
        path.as_posix()
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and path.parts[0] not in OUTSIDE
    }
    assert readers == {"training/distributed.py"}


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
    methods = ast.walk(tree(Path("training/train_config.py")))
    (model_config,) = (n for n in methods if isinstance(n, ast.FunctionDef) and n.name == "model_config")
    read |= settings_read(model_config, "self") if config is PlainTrainConfig else set()
    assert {field.name for field in dataclasses.fields(config)} - read == set()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short(path):
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= LIMITS.get(path.as_posix(), 200)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno and node.end_lineno - node.lineno < 40, f"{path}:{node.lineno} {node.name}"
