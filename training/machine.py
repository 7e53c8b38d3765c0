"""What a machine has, as JSON; launch_hosts.py and doctor.py ask it of every host, without importing torch.

python -m training.machine
"""

import hashlib
import json
import platform
import shutil
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "deepspeed", "numpy", "tiktoken", "wandb")


def look(port: int = 0) -> dict:
    """port: one that must be free; 0: any that is."""
    return {
        "code": code(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "gpus": gpus(),
        "addresses": said("hostname", "-I").split(),
        "port": free_port(port),
    }


def code() -> str:
    """A digest of all that decides what a run computes."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("*.py"), *(p for f in ("training", "data", "config") for p in (ROOT / f).rglob("*.py"))]
    for path in sorted([*files, *(ROOT / "deepspeed_configs").glob("*.json")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def gpus() -> int:
    return sum(line.startswith("GPU ") for line in said("nvidia-smi", "-L").splitlines())


def said(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.stdout if not done.returncode else ""


def free_port(port: int) -> int:
    """The port, or 0 where it is taken."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError:
            return 0
        return server.getsockname()[1]


if __name__ == "__main__":
    print(json.dumps(look(int(sys.argv[1]) if sys.argv[1:] else 0)))
