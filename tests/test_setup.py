"""The launch scripts in a folder of their own, with stubs for train.py and, on PATH, for what the machine has."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted(ROOT.glob("*.sh")), ROOT / ".ci" / "run"]
REPORT = """import os, sys
report = [os.environ["RANK"], os.environ["WORLD_SIZE"], *sys.argv[1:]]
os.write(1, f"{' '.join(report)}\\n".encode())  # in one piece
"""
SUDO = "" if os.geteuid() == 0 else "sudo "


class Clone:
    """A copy of the scripts, and a PATH that begins with stubs and the Python of the tests."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder / "clone", folder / "bin"
        for source in [*SCRIPTS, ROOT / "launch.py", *ROOT.glob("requirements*.txt")]:
            target = self.folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        self.write("train.py", REPORT)
        self.bin.mkdir()
        self.env = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "CXX")}
        self.env["PATH"] = f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.stub("nvidia-smi", "exit 9")

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def stub(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.bin / name).chmod(0o755)

    def gpus(self, count: int) -> None:
        self.stub("nvidia-smi", "\n".join(f"echo 'GPU {i}: Some GPU (UUID: GPU-{i})'" for i in range(count)))

    def without(self, program: str) -> None:
        """Make PATH the stubs alone, with links to all that the machine has but this program."""
        for folder in self.env["PATH"].split(":")[1:]:
            for file in Path(folder).iterdir() if Path(folder).is_dir() else ():
                if file.name != program and not (self.bin / file.name).exists():
                    self.stub(file.name, f'exec {file} "$@"')
        self.env["PATH"] = str(self.bin)

    def run(self, *command: str) -> tuple[int, str, str]:
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    def ddp(self, *arguments: str) -> tuple[int, str, str]:
        return self.run("./launch_traditional_ddp.sh", *arguments)


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_executable(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK) == (script.name != "launch_common.sh")  # that one is sourced


@pytest.mark.parametrize("script", [s.name for s in SCRIPTS if s.suffix == ".sh" and s.name != "launch_common.sh"])
def test_help_is_the_head_of_the_script(clone, script):
    status, output, errors = clone.run(f"./{script}", "--help")
    assert (status, errors) == (0, "")
    assert output.startswith(f"./{script} ") and "shellcheck" not in output and "environment" not in output


def test_an_active_python_with_the_packages_is_used_as_it_is(clone):
    start = time.monotonic()
    status, output, _ = clone.ddp("1")
    assert (status, output) == (0, "0 1 config/train_gpt2.py\n")
    assert time.monotonic() - start < 3
    assert not (clone.folder / ".venv").exists()


@pytest.mark.parametrize(
    "arguments, passed_on",
    [
        ([], "config/train_gpt2.py"),
        (["--start=a b", "--data_dir=x.py"], "config/train_gpt2.py --start=a b --data_dir=x.py"),
        (["config/mine.py", "--max_iters=3"], "config/mine.py --max_iters=3"),
        (["--max_iters=3", "config/mine.py"], "--max_iters=3 config/mine.py"),
    ],
)
def test_the_recipe_is_for_when_no_config_file_is_named(clone, arguments, passed_on):
    assert clone.ddp("1", *arguments)[1] == f"0 1 {passed_on}\n"


@pytest.mark.parametrize(
    "gpus, visible, arguments, ranks",
    [
        (3, None, [], 3),
        (3, None, ["2"], 2),
        (3, "0,2", [], 2),
        (3, "GPU-1", [], 1),
        (3, "0,1,2,3", [], 3),
        (3, "", [], 2),
        (3, None, ["4", "--device=cpu"], 4),
        (0, None, [], 2),
        (0, None, ["3"], 3),
    ],
)
def test_one_rank_for_every_gpu_or_two_cpu_ranks(clone, gpus, visible, arguments, ranks):
    if gpus:
        clone.gpus(gpus)
    if visible is not None:
        clone.env["CUDA_VISIBLE_DEVICES"] = visible
    status, output, errors = clone.ddp(*arguments)
    assert status == 0
    assert sorted(line.split()[:2] for line in output.splitlines()) == [[str(r), str(ranks)] for r in range(ranks)]
    on_cpu = not gpus or visible == "" or "--device=cpu" in arguments
    assert ("so ranks on the CPU" in errors) == on_cpu


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("8", "8 GPUs wanted, 2 visible: "),
        ("0", "0 ranks: must be a whole number from 1 on"),
        ("-1", "-1 ranks: must be a whole number from 1 on"),
        ("1.5", "1.5 ranks: must be a whole number from 1 on"),
        ("config/mine", "config/mine ranks: must be a whole number from 1 on"),
    ],
)
def test_a_number_of_ranks_that_cannot_be_is_one_message(clone, wanted, message):
    clone.gpus(2)
    status, output, errors = clone.ddp(wanted)
    assert (status, output) == (2, "")
    assert errors.startswith(f"launch_traditional_ddp.sh: {message}") and errors.count("\n") == 1


def test_all_that_debian_has_to_give_is_asked_for_at_once(clone):
    clone.stub("python", f'case "$*" in *INCLUDEPY*) echo /none ;; *) exec {sys.executable} "$@" ;; esac')
    clone.without("c++")
    status, _, errors = clone.run("./run_tests.sh")
    fix = f"{SUDO}apt-get install g++ python3-dev"
    assert (status, errors) == (2, f"run_tests.sh: missing: g++, Python headers. Install with: {fix}\n")
    assert clone.ddp("1")[0] == 0  # needs neither
    clone.env["CXX"] = "python -x"
    assert "missing: Python headers. " in clone.run("./run_tests.sh")[2]


@pytest.mark.parametrize(
    "python, message",
    [
        ("exit 1", "missing: Python 3.10 or newer. Install with: {}apt-get install python3 python3-venv"),
        (
            'case "$*" in *find_spec* | -\\ *) exit 1 ;; *ensurepip*) exit 1 ;; esac',
            "missing: Python's venv module. Install with: {}apt-get install python3-venv",
        ),
    ],
)
def test_a_python_that_cannot_make_an_environment_is_one_message(clone, python, message):
    for name in ("python", "python3"):
        clone.stub(name, python)
    status, _, errors = clone.ddp()
    assert (status, errors) == (2, f"launch_traditional_ddp.sh: {message.format(SUDO)}\n")
    assert not (clone.folder / ".venv").exists()


def wheel(folder: Path, name: str, version: int) -> None:
    """The smallest package that pip installs."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"version = {version}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_an_environment_is_made_once_whole_and_kept_up_to_date(clone, tmp_path):
    wheels = tmp_path / "wheels"
    wheel(wheels, "first_thing", 1)
    clone.env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    clone.write("requirements.txt", "# what it needs\nfirst_thing==1\nsecond_thing==1  # not there yet\n")
    clone.write("train.py", "import first_thing, second_thing, sys; print(second_thing.version, sys.prefix)")

    status, output, errors = clone.ddp("1")
    assert (status, output) == (2, "")
    assert "No matching distribution found for second_thing==1" in errors  # pip's own words
    assert errors.splitlines()[-1].startswith("launch_traditional_ddp.sh: pip could not install")

    wheel(wheels, "second_thing", 1)
    left = clone.folder / ".venv" / "left by the first start"
    left.touch()
    status, output, errors = clone.ddp("1")
    assert (status, output) == (0, f"1 {clone.folder}/.venv\n")
    assert errors.count("installing the packages") == 1 and not left.exists()

    assert "installing" not in clone.ddp("1")[2]

    wheel(wheels, "second_thing", 2)
    clone.write("requirements.txt", "first_thing==1\nsecond_thing==2\n")
    status, output, errors = clone.ddp("1")
    assert (status, output) == (0, f"2 {clone.folder}/.venv\n")
    assert "installing the packages" in errors


@pytest.fixture
def quickstart(clone):
    clone.write("data/python_stdlib/prepare.py", "open('data/python_stdlib/meta.json', 'w'); print('prepared')")
    clone.write("sample.py", "import sys; print('sampled', *sys.argv[1:])")
    return clone


def test_quickstart_prepares_once_trains_and_samples(quickstart):
    status, output, _ = quickstart.run("./launch_quickstart.sh", "1")
    assert status == 0
    prepared, trained, _, sampled, _, end = output.splitlines()
    assert (prepared, trained) == ("prepared", "0 1 config/train_quickstart.py")
    assert sampled.startswith("sampled --out_dir=out-quickstart ")
    assert "out-quickstart/loss.png" in end

    status, output, _ = quickstart.run("./launch_quickstart.sh", "1", "--out_dir=out my run")
    assert "prepared" not in output
    assert "sampled --out_dir=out my run " in output and "out my run/loss.png" in output


def test_quickstart_ends_where_training_fails(quickstart):
    quickstart.write("train.py", "import sys; sys.exit('error: no')")
    status, output, errors = quickstart.run("./launch_quickstart.sh", "1")
    assert status == 1
    assert "error: no" in errors and "sampled" not in output


@pytest.mark.parametrize("handler", ["signal.SIG_DFL", "lambda *_: sys.exit(0)"])
def test_quickstart_passes_sigterm_on_and_does_not_sample(quickstart, handler):
    quickstart.write(
        "train.py",
        "import os, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, {handler})\n"
        "print(os.getpid(), flush=True)\ntime.sleep(60)",
    )
    quickstart.write("data/python_stdlib/meta.json", "{}")
    with subprocess.Popen(
        ["./launch_quickstart.sh", "1"], cwd=quickstart.folder, env=quickstart.env, stdout=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout
        pid = int(script.stdout.readline())
        script.send_signal(signal.SIGTERM)
        rest, _ = script.communicate(timeout=10)
    assert (rest, script.returncode) == ("", 128 + signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
