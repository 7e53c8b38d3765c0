"""The Python environment that the launch scripts find or make."""

import os
import sys
import zipfile
from pathlib import Path

import pytest


def test_the_tests_need_a_compiler(clone):
    clone.without("c++")
    status, _, errors = clone.run("./run_tests.sh")
    assert (status, errors) == (2, "run_tests.sh: no C++ compiler (c++); sudo apt-get install g++ python3-dev\n")
    assert clone.ddp("1")[0] == 0  # needs none


@pytest.mark.parametrize("tests, types, status", [(0, 0, 0), (0, 1, 1), (5, 0, 5), (5, 1, 1)])
def test_run_tests_fails_where_the_tests_or_the_types_do(clone, tests, types, status):
    run = f'*" pytest --quick -k x") echo tested; exit {tests} ;; *" mypy "*) echo typed; exit {types} ;;'
    clone.stub("python", f'case "$*" in {run} *" ruff "*) ;; *) exec {sys.executable} "$@" ;; esac')
    ended, output, _ = clone.run("./run_tests.sh", "--quick", "-k", "x")
    assert (ended, output) == (status, "tested\ntyped\n")


@pytest.mark.parametrize(
    "python", ["exit 1", 'case "$*" in *find_spec* | -\\ *) exit 1 ;; *ensurepip*) exit 1 ;; esac']
)
def test_a_python_that_cannot_make_an_environment_is_one_message(clone, python):
    for name in ("python", "python3"):
        clone.stub(name, python)
    status, _, errors = clone.ddp()
    message = "Python 3.10 or newer with venv is missing; sudo apt-get install python3 python3-venv"
    assert (status, errors) == (2, f"launch_traditional_ddp.sh: {message}\n")
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
