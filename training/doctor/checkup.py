"""What of a machine a run depends on, looked at closely: seconds, where training.machine takes milliseconds."""

import os
import resource
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training import machine

MB = 2**20
SIZE = 128 * MB  # of the file that a disk is measured with
SECONDS = 2.0  # after which no more is written to a slow one
CAN_LOCK, CAN_FORK = 14, 24  # CAP_IPC_LOCK, CAP_SYS_RESOURCE: limits do not count for who has these
USE_GPU = "import torch; torch.zeros(1, device='cuda'); print(torch.cuda.device_count())"


def facts(environment: Mapping[str, str], out_dir: str, dataset: str, nvme: str, port: int) -> dict[str, Any]:
    """As JSON has them. environment: the one that the ranks will have; nvme: a folder, or nothing."""
    quick = machine.look(port)
    return {
        **quick,
        "cuda": cuda(),
        "gpu": gpu(),
        "usable": usable() if quick["gpus"] else "0",
        "tools": tools(environment),
        "memory": memory(),
        "cores": cores(),
        "shm": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,  # noqa: S108
        "limits": limits(),
        "out_dir": disk(out_dir, made=True),
        "nvme": disk(nvme) if nvme else None,
        "data": {name: size(Path(dataset, name)) for name in ("train.bin", "val.bin")},
    }


def cuda() -> str | None:
    """What torch was built with. Importing it would take seconds, so only its version file is run."""
    spec = find_spec("torch")
    path = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return runpy.run_path(str(path)).get("cuda") if path and path.is_file() else None


def gpu() -> list[dict[str, Any]]:
    """Memory in bytes."""
    lines = machine.said(
        "nvidia-smi", "--query-gpu=name,memory.free,driver_version", "--format=csv,noheader,nounits"
    ).splitlines()
    rows = [line.split(", ") for line in lines]
    return [{"name": name, "free": int(free) * MB, "driver": driver} for name, free, driver in rows if free.isdecimal()]


def usable() -> str:
    """The number of GPUs that torch can use, or why it cannot."""
    done = subprocess.run([sys.executable, "-c", USE_GPU], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    said = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return said[-1] if said else f"ended with status {done.returncode}"


def tools(environment: Mapping[str, str]) -> dict[str, str]:
    """The paths of what compiles DeepSpeed's ops, as torch and launch_common.sh look for them; "" where missing."""
    path = environment.get("PATH")
    name = environment.get("CXX", "c++").split()[0]
    compiler = shutil.which(name, path=path) or ""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    home = environment.get("CUDA_HOME", "/usr/local/cuda")
    probe = [compiler, "-include", "libaio.h", "-x", "c++", "-fsyntax-only", os.devnull]
    libaio = bool(compiler) and not subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True).returncode
    return {
        "CXX": name,
        "compiler": compiler,
        "headers": str(headers) if headers.exists() else "",
        "ninja": shutil.which("ninja", path=path) or "",
        "libaio": "libaio.h" if libaio else "",
        "nvcc": shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{path}") or "",
    }


def memory() -> int | None:
    """Bytes that are free, or can be made so; a container may have fewer than its machine."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = said_by_cgroup("memory.max")
    if limit and limit[0].isdecimal():
        cached = dict(zip(*[iter(said_by_cgroup("memory.stat"))] * 2, strict=False))["inactive_file"]
        free = min(free, int(limit[0]) - int(said_by_cgroup("memory.current")[0]) + int(cached))
    return free


def cores() -> int:
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = said_by_cgroup("cpu.max")
    return min(count, max(1, int(quota[0]) // int(quota[1]))) if quota and quota[0].isdecimal() else count


def said_by_cgroup(name: str) -> list[str]:
    try:
        return Path("/sys/fs/cgroup", name).read_text().split()
    except OSError:
        return []


def limits() -> dict[str, int | None]:
    """None: no limit."""
    return {
        "open files": limit(resource.RLIMIT_NOFILE),
        "locked memory": None if capable(CAN_LOCK) else limit(resource.RLIMIT_MEMLOCK),
        "processes": None if capable(CAN_FORK) else limit(resource.RLIMIT_NPROC),
    }


def limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def capable(bit: int) -> bool:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return os.geteuid() == 0
    return any(int(line.split()[1], 16) >> bit & 1 for line in lines if line.startswith("CapEff:"))


def size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def existing(folder: str) -> Path:
    """The folder, or the nearest above it that there is."""
    path = Path(folder).absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def disk(folder: str, made: bool = False) -> dict[str, Any]:
    """Bytes free, and the bytes a second that a real file is written and read with; "error" says why not.

    made: whether the run makes the folder; then it is the nearest above it that counts.
    """
    found: dict[str, Any] = {"folder": folder, "error": ""}
    try:
        place = existing(folder) if made else Path(folder)
        found["free"] = shutil.disk_usage(place).free
        found["write"], found["read"] = speed(place)
    except OSError as error:
        found["error"] = error.strerror or str(error)
    return found


def speed(place: Path) -> tuple[float, float]:
    piece, written = os.urandom(8 * MB), 0  # some disks compress
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:  # no name: gone with this process, however that ends
        begun = time.perf_counter()
        while written < SIZE and time.perf_counter() - begun < SECONDS:
            written += file.write(piece) or 0
        os.fsync(file.fileno())
        writing = time.perf_counter() - begun
        if hasattr(os, "posix_fadvise"):  # or it would be read from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begun = time.perf_counter()
        while file.read(len(piece)):
            pass
        return written / writing, written / (time.perf_counter() - begun)
