"""Print what a machine has as JSON: code, packages, GPUs, addresses, a free port. Quick: standard library only."""

import hashlib
import json
import platform
import shutil
import socket
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = ("*.py", "config/*.py", "data/**/*.py", "deepspeed_configs/*.json", "launch/*.py", "tools/*.py", "training/*.py")
PACKAGES = ("torch", "deepspeed", "numpy", "tiktoken", "wandb")
SAME = ("code", "python", *PACKAGES)  # facts in which the hosts of a run must agree


def describe() -> dict:
    """Facts about this host."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return {
        "code": digest.hexdigest()[:12],
        "python": platform.python_version(),
        **{name: next((d.version for d in distributions(name=name)), "missing") for name in PACKAGES},
        "gpus": count_gpus(),
        "address": next(iter(output_of("hostname", "-I").split()), ""),
        "port": free_port(),
    }


def count_gpus(visible: str | None = None) -> int:
    """GPUs that nvidia-smi lists; no more than CUDA_VISIBLE_DEVICES names if its value is given as `visible`."""
    gpus = sum(line.startswith("GPU ") for line in output_of("nvidia-smi", "-L").splitlines())
    if visible is None:
        return gpus
    names = [name.strip() for name in visible.split(",")]
    return min(gpus, sum(name[:1].isdecimal() or name.startswith(("GPU-", "MIG-")) for name in names))


def output_of(*command: str) -> str:
    """What a program prints; "" where it is missing or fails, with its message on stderr."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        print(f"{command[0]} failed: {(done.stderr or done.stdout).strip() or done.returncode}", file=sys.stderr)
    return "" if done.returncode else done.stdout


def free_port(host: str = "") -> int:
    """A port in TIME_WAIT: rank 0 may listen on it, no other process is given it."""
    with socket.create_server((host, 0)) as server, socket.socket() as client:
        client.connect(("127.0.0.1", server.getsockname()[1]))
        server.accept()[0].close()  # the side that closes first is the one that waits
        return server.getsockname()[1]


if __name__ == "__main__":
    print(json.dumps(describe()))
