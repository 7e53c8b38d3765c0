"""Examine this machine: read what tools.doctor asks from stdin, and print JSON."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import machine

REQUIREMENTS = "pip install -r requirements.txt"
PROCESS_BYTES = 1e9  # of a rank: Python, torch, DeepSpeed, activations of a small model
COUNT_GPUS = "import torch; torch.zeros(1, device='cuda'); print(torch.cuda.device_count())"
Request = dict[str, Any]  # what a run needs of this host; tools.doctor.make_requests lists the keys


@dataclass(frozen=True)
class Finding:
    check: str
    value: str
    ok: bool
    fix: str  # what to do if it is not
    host: str = ""  # filled in by tools.doctor


def compare(check: str, free: float, needed: float, fix: str) -> Finding:
    return Finding(check, f"{free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB needed", free >= needed, fix)


def check_software(facts: dict[str, Any], torch_versions: list[list[int]]) -> Iterator[Finding]:
    version = [int(part) for part in facts["torch"].split(".")[:2] if part.isdecimal()]
    yield Finding("torch", facts["torch"], torch_versions[0] <= version <= torch_versions[1], REQUIREMENTS)
    missing = [name for name in ("deepspeed", "numpy", "tiktoken") if facts[name] == "missing"]
    yield Finding("packages", f"missing: {', '.join(missing)}" if missing else "installed", not missing, REQUIREMENTS)


def check_compiler(ops: list[str], environment: dict[str, str], gpus: int) -> Iterator[Finding]:
    """What compiles DeepSpeed's C++ ops, looked up as torch does."""
    name = environment.get("CXX", "c++").split()[0]
    compiler = shutil.which(name, path=environment.get("PATH"))
    if ops:
        yield Finding(f"C++ compiler {name}", compiler or "missing", bool(compiler), "apt-get install g++")
    if compiler and "async_io" in ops:
        command = [compiler, "-include", "libaio.h", "-x", "c++", "-fsyntax-only", os.devnull]
        libaio = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
        yield Finding("libaio", "installed" if libaio else "missing", libaio, "apt-get install libaio-dev")
    if gpus and "async_io" in ops:
        toolkit = Path(environment.get("CUDA_HOME") or "/usr/local/cuda", "include", "cuda.h")
        fix = "install the CUDA toolkit that torch was built with, and set CUDA_HOME"
        yield Finding("CUDA toolkit for NVMe offload", str(toolkit), toolkit.is_file(), fix)


def check_gpus(request: Request, gpus: int) -> Iterator[Finding]:
    if not gpus:
        yield Finding("GPUs", "none", request["device"] != "cuda", "install the driver, or set --device=cpu")
        return
    query = ("--query-gpu=name,memory.free,driver_version", "--format=csv,noheader,nounits")
    rows = [line.split(", ") for line in machine.output_of("nvidia-smi", *query).splitlines()]
    done = subprocess.run([sys.executable, "-c", COUNT_GPUS], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    usable = ((done.stdout or done.stderr).strip().splitlines() or [f"status {done.returncode}"])[-1]
    ok = usable.isdecimal() and int(usable) >= request["slots"]
    fix = "install a driver and a torch of one CUDA version (https://pytorch.org), or write fewer slots"
    yield Finding("GPUs", f"{gpus} x {rows[0][0]}, driver {rows[0][2]}; usable by torch: {usable}", ok, fix)
    free = min((int(row[1]) * 2**20 for row in rows if row[1].isdecimal()), default=0)
    yield compare("GPU memory", free, request["state_bytes"]["gpu"], "use a higher ZeRO stage, offload, or more ranks")


def check_memory(request: Request, gpus: int) -> Iterator[Finding]:
    ranks = request["slots"]
    if sys.platform == "linux":
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        rank_bytes = PROCESS_BYTES + request["state_bytes"]["cpu"] + (0 if gpus else request["state_bytes"]["gpu"])
        yield compare("memory", free, ranks * rank_bytes, "use fewer ranks per host, a higher ZeRO stage, or NVMe")
        size = shutil.disk_usage("/dev/shm").total  # noqa: S108
        needed = request["nccl_shm_bytes"] if gpus and ranks > 1 else 0
        yield Finding("shared memory", f"{size / 1e9:,.1f} GB", size >= needed, request["shm_fix"])


def check_storage(request: Request) -> Iterator[Finding]:
    out_dir = existing(request["out_dir"])
    yield check_disk("out_dir, space", out_dir, request["kept_bytes"], "free space, or choose another --out_dir")
    if request["marker"]:
        shared, fix = Path(request["marker"]).exists(), "put --out_dir on a disk that all hosts share"
        yield Finding("out_dir, shared", "yes" if shared else f"{request['marker']} is missing here", shared, fix)
    if request["nvme_path"]:
        path, needed = Path(request["nvme_path"]), request["slots"] * request["state_bytes"]["nvme"]
        yield check_disk("NVMe, space", path, needed, "set --nvme_path to a folder with space on a local NVMe disk")
    if request["dataset"]:
        folder = Path(request["dataset"])
        missing = [name for name in ("train.bin", "val.bin") if not (folder / name).is_file()]
        value = f"no {' and '.join(missing)}" if missing else f"{data_bytes(folder):,} bytes"
        yield Finding("data set", f"{folder.name}: {value}", not missing, "prepare it, or copy it from another host")


def check_disk(check: str, folder: Path, needed: float, fix: str) -> Finding:
    """Whether files can be written there, and the free space."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return compare(check, shutil.disk_usage(folder).free, needed, fix)
    except OSError as error:
        return Finding(check, f"{folder}: {error.strerror}", False, fix)


def data_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.bin"))


def existing(folder: str) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = Path(folder).absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def main() -> None:
    """Print facts in which hosts must agree, and the findings about this one."""
    request, facts = json.loads(sys.stdin.readline()), machine.describe()
    gpus = facts["gpus"] if request["device"] in ("auto", "cuda") else 0
    findings = [*check_software(facts, request["torch"]), *check_compiler(request["ops"], request["environment"], gpus)]
    findings += [*check_gpus(request, gpus), *check_memory(request, gpus), *check_storage(request)]
    facts |= {"findings": [asdict(finding) for finding in findings], "device": "GPU" if facts["gpus"] else "CPU"}
    print(json.dumps({**facts, "data": data_bytes(Path(request["dataset"])) if request["dataset"] else 0}))


if __name__ == "__main__":
    main()
