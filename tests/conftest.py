"""What several tests need."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import cluster, needs
from tests.clone import Clone
from tests.running import ROOT, train
from tests.words import words

SHARED = ROOT.parent / "shared" / "data"
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A test that starts a process group in its own process sets GLOO_SOCKET_IFNAME; launches would keep it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return words(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): a folder that `make(folder)` fills, once for the tests of all workers. Do not write to it."""
    folder = tmp_path_factory.getbasetemp()
    shared = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "once"
    shared.mkdir(exist_ok=True)

    def find_or_make(name: str, make: Callable[[Path], object]) -> Path:
        done = shared / f"{name}.done"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(shared / name, ignore_errors=True)  # left by a failed attempt
                (shared / name).mkdir()
                make(shared / name)
                done.touch()
        return shared / name

    return find_or_make


@pytest.fixture(scope="session")
def reference(once, data):
    """reference(**settings): the folder of a run of one process. Many tests compare with the same one."""

    def find_or_train(**settings: Any) -> Path:
        name = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]
        return once(f"reference_{name}", lambda folder: train(folder, data, **settings))

    return find_or_train


@pytest.fixture
def copy(tmp_path) -> Path:
    """The tracked files that training needs."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folder = tmp_path / "copy"
    for name in names:
        needed = not name.startswith(("tests/", "results/", "docs/")) or name == "tests/acceptance.py"
        if needed and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def make_data(tmp_path):
    """make_data(ids, vocabulary, name): a data set whose splits both hold ids."""

    def make(ids, vocab_size: int = 257, name: str = "made") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        ids = np.asarray(ids, "<u2")
        for split in ("train", "val"):
            ids.tofile(folder / f"{split}.bin")
        characters = "".join(map(chr, range(32, 32 + vocab_size)))
        tokenizer = {"name": "byte"} if vocab_size == 257 else {"name": "char", "characters": characters}
        about = {"tokenizer": tokenizer, "dtype": "uint16", "vocab_size": vocab_size}
        about |= {"train_tokens": len(ids), "val_tokens": len(ids), "source": "made", "sha256": ""}
        (folder / "meta.json").write_text(json.dumps(about))
        return folder

    return make


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    path = SHARED / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="session")
def bpe_files() -> None:
    folder = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    if not folder.is_dir() or not list(folder.iterdir()):
        pytest.skip(f"TIKTOKEN_CACHE_DIR = {folder} holds no BPE files")


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture
def trio(tmp_path):
    """Three hosts, to be broken."""
    cluster.require()
    (tmp_path / "cluster").mkdir()
    with cluster.Cluster(tmp_path / "cluster", 3) as made:
        yield made


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the core only: the tests of QUICK in tests/conftest.py")
    parser.addoption(
        "--fuzz-minutes", type=float, default=0, help="of tests/test_fuzz.py; default: 30 s, the same cases"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*names): skip where the machine lacks one of them; see tests/needs.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --quick, do not even import other files."""
    is_test = collection_path.name.startswith("test_")
    return True if config.getoption("quick") and is_test and collection_path.stem[5:] not in QUICK else None


class Scheduling(LoadScopeScheduling):
    """Spread the tests of some files over the workers; those of any other share one, and its fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if Path(file).stem[5:] in SPREAD else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first."""
    order = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if config.getoption("quick"):
        kept = [item for item in items if re.search(QUICK.get(item.path.stem[5:], "^$"), item.name)]
        unmatched = {item.path.stem[5:] for item in items} & QUICK.keys() - {item.path.stem[5:] for item in kept}
        assert not unmatched, f"--quick: no test of {unmatched} matches its pattern in QUICK"
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        needs.require(*marker.args)


def pytest_terminal_summary(terminalreporter) -> None:
    """List what was skipped, by reason, and what to install for it; and how many cases were fuzzed."""
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    if fuzzed := [value for report in reports for key, value in report.user_properties if key == "fuzz"]:
        terminalreporter.section("fuzzed")
    for row in [["target", "cases", "used", "refused", "failures"], *fuzzed] if fuzzed else []:
        terminalreporter.line(f"{row[0]:<20}" + "".join(f"{cell:>10}" for cell in row[1:]))
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    if reasons:
        terminalreporter.section("skipped")
    for reason, count in sorted(reasons.items()):
        terminalreporter.line(f"{count} test{'s' * (count > 1)}: {reason}")
    if packages := {name for reason in reasons for name in reason.partition("apt-get install ")[2].split()}:
        terminalreporter.line(f"To run all of them: apt-get install {' '.join(sorted(packages))}")


# Files that take longest, in the order in which they start, and those of them whose tests need not share a worker. The
# tests over hosts share one, because they mostly wait, while the other workers use the processors.
LONG = ["hosts", "benchmark", "guides", "changes", "accept", "fork_server", "stragglers", "fsdp", "stopping", "readme"]
LONG += ["hf_trainer", "zero", "zero_runs", "layouts", "slow_links", "deepspeed_errors", "doctor", "crossing", "kill"]
LONG += ["launch", "runs", "half", "muon", "convert_nanogpt", "pretrained", "safety", "fuzz", "plan_layouts"]
SPREAD = {*LONG[LONG.index("stopping") :]} - {"hf_trainer", "doctor", "half", "muon", "pretrained"}
# For --quick: the files whose tests run, and which of their tests, as a pattern.
QUICK = {
    **dict.fromkeys(["architecture", "config", "model", "data_errors", "training", "bad_input"], ""),
    **dict.fromkeys(["deepspeed_config", "devices", "plan"], ""),
    "deepspeed_errors": "errors_have_the_fix|all_problems",
    "fork_server": "state|test_a_script_ends",
    "fsdp": r"\[full-2\]",
    "launch": "variables|status|dies|signals_reach",
    "runs": "two_ranks|killed_run|run_folder|eval_only",
    "zero": r"trains_as_one_process\[zero[123]\]",
}
