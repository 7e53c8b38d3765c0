"""The launch scripts in a folder of their own, with stubs for the train scripts and for what the machine has."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.running import ROOT

SCRIPTS = [*sorted(ROOT.glob("*.sh")), ROOT / ".ci" / "run"]
REPORT = """import os, sys
report = [os.environ["RANK"], os.environ["WORLD_SIZE"], *sys.argv[1:]]
os.write(1, f"{' '.join(report)}\\n".encode())  # in one piece
"""


class Clone:
    """A copy of the scripts, and a PATH that begins with stubs and the Python of the tests."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder / "clone", folder / "bin"
        for source in [*SCRIPTS, *(ROOT / "launch").glob("*.*"), *ROOT.glob("requirements*.txt")]:
            target = self.folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        self.write("train.py", REPORT)
        self.write("train_deepspeed.py", REPORT)
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
