"""Rules about a machine and what is installed on it."""

from collections.abc import Callable

from training.doctor.case import NOT_NEEDED, Case, Rule, Verdict, red
from training.doctor.needs import PROCESS
from training.units import gigabytes

PYTHON, TORCH = (3, 10), ((2, 11), (2, 13))  # at least; from, to
REQUIREMENTS = "pip install -r requirements.txt"
SHM = 64e6  # bytes of /dev/shm: Docker gives 64 MiB
SHM_OF_NCCL = 1e9  # and this is what NVIDIA's containers ask for, as the GPUs of a machine talk through it
FILES = 1024  # open at once: sockets to all ranks, data, libraries
LOCKED = 1e9  # bytes that cannot be swapped: buffers for NVMe, memory that InfiniBand cards read
PROCESSES = 256  # threads of a rank: OpenMP's, NCCL's, torch.compile's
SKEW = 1.0  # seconds: file times and logs of several hosts are compared


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def python(case: Case) -> Verdict:
    version, text = case.facts["python"], case.differs("python")
    if text:
        return red(text)
    return version, release(version) >= PYTHON, f"install Python {PYTHON[0]}.{PYTHON[1]} or newer"


def torch(case: Case) -> Verdict:
    version, built = case.facts["packages"]["torch"], case.facts["cuda"]
    value = f"{version}, {f'CUDA {built}' if built else 'for the CPU'}"
    if case.on_gpus and not built:
        return value, False, "this build cannot use the GPUs here; install the one for CUDA: https://pytorch.org"
    return value, TORCH[0] <= release(version) <= TORCH[1], REQUIREMENTS


def deepspeed(case: Case) -> Verdict:
    version = case.facts["packages"]["deepspeed"]
    return version, version != "missing", REQUIREMENTS


def packages(case: Case) -> Verdict:
    lacking = [name for name in ("numpy", "tiktoken") if case.facts["packages"][name] == "missing"]
    if lacking:
        return f"missing: {', '.join(lacking)}", False, REQUIREMENTS
    text = case.differs("packages")
    return red(text) if text else ("numpy, tiktoken ...", True, "")


def code(case: Case) -> Verdict:
    text = case.differs("code")
    return red(text) if text else (case.facts["code"], True, "")


def gpus(case: Case) -> Verdict:
    count, found, usable = case.facts["gpus"], case.facts["gpu"], case.facts["usable"]
    if not count:
        wanted = case.need.cfg.device == "cuda" or case.facts_of_first["gpus"]
        return "none", False if wanted else None, "nvidia-smi -L names none; install the driver, or set --device=cpu"
    value = f"{count} x {found[0]['name']}, driver {found[0]['driver']}" if found else f"{count}"
    if case.on_gpus and (not usable.isdecimal() or int(usable) < case.ranks <= count):
        return f"{value}: torch says {usable}", False, f"take a driver that knows CUDA {case.facts['cuda']}"
    if case.on_gpus and max(case.host.slots) >= count:
        return value, False, f"slots={max(case.host.slots) + 1} are wanted; write slots={count}, or --ranks={count}"
    return value, True, ""


def nvcc(case: Case) -> Verdict:
    """Not red: DeepSpeed's FusedAdam needs it, and torch's does as well."""
    if not case.on_gpus:
        return NOT_NEEDED
    return case.facts["tools"]["nvcc"] or "missing: torch's fused AdamW instead of DeepSpeed's", None, ""


def tool(name: str, package: str, op: str = "") -> Rule:
    """What compiles DeepSpeed's ops."""

    def rule(case: Case) -> Verdict:
        if not case.need.ops or (op and op not in case.need.ops):
            return NOT_NEEDED
        if name == "libaio" and not case.facts["tools"]["compiler"]:
            return "looked for with a compiler", None, ""
        path = case.facts["tools"][name]
        missing = f"{case.facts['tools']['CXX']}: missing" if name == "compiler" else "missing"
        return path or missing, bool(path), package

    return rule


def memory(case: Case) -> Verdict:
    free, need = case.facts["memory"], case.need
    if free is None:
        return "unknown", None, ""
    needed = case.ranks * (PROCESS + need.state("cpu") + (0 if case.on_gpus else need.state("device")))
    value = f"{gigabytes(free)} free, {gigabytes(needed)} needed"
    return value, free >= needed, "fewer ranks a host, a higher ZeRO stage, or offload to NVMe"


def gpu_memory(case: Case) -> Verdict:
    if not case.on_gpus or not case.facts["gpu"]:
        return NOT_NEEDED
    free, needed = min(gpu["free"] for gpu in case.facts["gpu"]), case.need.state("device")
    value = f"{gigabytes(free)} free, {gigabytes(needed)} needed and activations"
    return value, free >= needed, "a higher ZeRO stage, offload, more ranks; or end what else runs there (nvidia-smi)"


def shared_memory(case: Case) -> Verdict:
    size, nccl = case.facts["shm"], case.on_gpus and case.ranks > 1
    if size is None:
        return "none", None, ""
    fix = "docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm"
    return gigabytes(size), size >= (SHM_OF_NCCL if nccl else SHM), fix


def at_least(name: str, wanted: Callable[[Case], float], fix: str) -> Rule:
    """A limit of the shell's, or of sshd's; wanted: 0 where it does not count."""

    def rule(case: Case) -> Verdict:
        limit, least = case.facts["limits"][name], wanted(case)
        value = "no limit" if limit is None else f"{limit:,}"
        return (
            value,
            None if not least else limit is None or limit >= least,
            f"{least:,.0f} needed: {fix}; for good: limits.conf",
        )

    return rule


def locked(case: Case) -> float:
    return LOCKED if case.need.nvme or (case.on_gpus and case.need.hosts > 1) else 0


def cores(case: Case) -> Verdict:
    count = case.facts["cores"]
    return f"{count} for {case.ranks} ranks", count >= case.ranks, "ranks that share a core wait for each other: fewer"


def port(case: Case) -> Verdict:
    if case.host.name != case.first:
        return NOT_NEEDED
    found = case.facts["port"]
    return f"{found or 'taken'}", bool(found), "leave --master_port out, and a free one is found"


def clock(case: Case) -> Verdict:
    if case.need.hosts == 1:
        return NOT_NEEDED
    skew = case.facts["skew"]
    return f"{abs(skew):.3f} s {'ahead' if skew > 0 else 'behind'}", abs(skew) <= SKEW, "run chrony or ntpd there"
