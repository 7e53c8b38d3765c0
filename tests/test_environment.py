"""The Python environment that the launch scripts find or make."""

import os
import sys
import zipfile
from pathlib import Path

import pytest

SUDO = "" if os.geteuid() == 0 else "sudo "


def test_all_that_debian_has_to_give_is_asked_for_at_once(clone):
    clone.stub("python", f'case "$*" in *INCLUDEPY*) echo /none ;; *) exec {sys.executable} "$@" ;; esac')
    clone.without("c++")
    status, _, errors = clone.run("./run_tests.sh")
    fix = f"{SUDO}apt-get install g++ python3-dev libaio-dev"
    assert (status, errors) == (2, f"run_tests.sh: missing: g++, Python headers, libaio. Install with: {fix}\n")
    assert clone.ddp("1")[0] == 0  # needs neither
    clone.env["CXX"] = "python -x"
    assert "missing: Python headers" in clone.run("./run_tests.sh")[2]


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
