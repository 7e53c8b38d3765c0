"""Ranks: which one this process is, on which device, and how it ends. The only reader of the launcher's variables."""

import errno
import inspect
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from data.errors import DataError
from training.errors import LOST, STOPPED, USER_ERROR, ConfigError, NodeError, RankError, Stopped, UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
# What a user's disk, folder or limit can cause. Any other OSError is a bug and keeps its traceback.
USERS_ERRNOS = CANNOT_WRITE | {errno.EIO, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE}
LAUNCH_HINT = "python -m launch.ranks N SCRIPT sets it; for one process, unset RANK, LOCAL_RANK and WORLD_SIZE"
NVIDIA_DEVICE = Path("/dev/nvidiactl")
SHARED_MEMORY, NCCL_SHARED_MEMORY = Path("/dev/shm"), 2**30  # noqa: S108
LARGER_SHARED_MEMORY = "docker run --shm-size=1g, or mount -o remount,size=1g /dev/shm"
REPORT_SECONDS = 10.0  # for rank 0 to report an error that another rank finds first
LOST_RANK = ("Connection closed by", "Connection reset by", "Broken pipe", "Timed out waiting", "remote process")


def read_number(name: str, default: str, least: int, most: int = 999_999) -> int:
    """A variable of the launcher. Raises RankError if it is not a whole number in this range."""
    text = os.environ.get(name, default)
    if not re.fullmatch("[0-9]{1,6}", text) or not least <= int(text) <= most:
        raise RankError(f"{name} = {text!r} (environment): must be a whole number, {least} to {most}; {LAUNCH_HINT}")
    return int(text)


rank = partial(read_number, "RANK", default="0", least=0)
local_rank = partial(read_number, "LOCAL_RANK", default="0", least=0)
world_size = partial(read_number, "WORLD_SIZE", default="1", least=1)


def local_world_size() -> int:
    """Ranks on this node; DeepSpeed's launcher calls the variable LOCAL_SIZE."""
    return read_number("LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE", "1", least=1)


def check_launch() -> int:
    """The world size. Raises RankError if the launcher's variables are wrong: before a rank waits for another one."""
    this_rank, ranks = rank(), world_size()
    if this_rank >= ranks:
        raise RankError(f"RANK = {this_rank} (environment): must be below WORLD_SIZE, {ranks}; {LAUNCH_HINT}")
    if ranks > 1 and not os.environ.get("MASTER_ADDR"):
        raise RankError(f"MASTER_ADDR = '' (environment): must be the host of rank 0; {LAUNCH_HINT}")
    if ranks > 1:
        read_number("MASTER_PORT", "", least=1, most=65535)
    local_rank()
    local_world_size()
    return ranks


@dataclass(frozen=True)
class Layout:
    """How many ranks share one copy of the model, by way of splitting it; the others train on other batches.

    Ranks are numbered with tensor parallelism innermost, then sequence, data, and pipeline outermost.
    """

    tensor: int = 1
    sequence: int = 1
    pipeline: int = 1
    expert: int = 1  # these share the ranks of data parallelism

    def data(self, world_size: int) -> int:
        """The number of ranks with batches of their own."""
        return world_size // (self.tensor * self.sequence * self.pipeline)


@dataclass(frozen=True)
class Ranks:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo group for messages between CPUs; None: the default group
    layout: Layout = Layout()

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def data_size(self) -> int:
        return self.layout.data(self.world_size)

    @property
    def data_rank(self) -> int:
        """Whose batches this rank has; ranks that share a copy of the model have the same."""
        return self.rank // (self.layout.tensor * self.layout.sequence) % self.data_size

    @property
    def sequence_rank(self) -> int:
        return self.rank // self.layout.tensor % self.layout.sequence

    def names(self, ranks: list[int]) -> str:
        """ "ranks 0, 3"; where the model is split, with their places: "rank 3 (pipeline 1, tensor 1)"."""
        if self.layout == Layout():
            return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        from training.parallel import place

        return ", ".join(place(self.layout, self.world_size, rank) for rank in ranks)

    def start_mean(self, value: torch.Tensor) -> dist.Work | None:
        """Start to replace value by its mean over all ranks. A rank that needs it calls wait(); all keep `value`."""
        value /= self.world_size
        return dist.all_reduce(value, async_op=True) if self.world_size > 1 else None

    def share(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. A collective between CPUs, in JSON: unpickling would run a stranger's code."""
        if self.world_size == 1:
            return [value]
        text = json.dumps(value).encode()
        longest = int(max(self.gather(torch.tensor([len(text)]))))
        rows = self.gather(torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8))
        return [json.loads(row.numpy().tobytes()) for row in rows]

    def gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(rows, mine, group=self.control)
        return rows

    def agree(self, facts: dict[str, Any]) -> None:
        """Raise UserError on all ranks where any of them has other facts than rank 0. A collective."""
        answers = self.share([socket.gethostname(), facts])
        first, expected = answers[0]
        for rank, (host, theirs) in enumerate(answers):
            for name in {**expected, **theirs}:
                value, other = expected.get(name, "missing"), theirs.get(name, "missing")
                if value != other:
                    where = f"on rank {rank} ({host}), but {value} on rank 0 ({first})"
                    raise UserError(f"{name}: {other} {where}; make them the same")

    def progress(self, items: Iterable, text: str) -> Iterable:
        """Iterate with a progress bar on rank 0."""
        return tqdm(items, text, leave=False, disable=None if self.main else True)  # None: only on a terminal

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise a user's error of any rank (a full disk, a missing file) on all ranks, with the same message."""
        message = ""
        try:
            yield
        except (UserError, DataError, OSError) as error:
            message = describe_error(error)
        if messages := list(filter(None, self.share(message))):
            raise UserError(messages[0])


SINGLE_PROCESS = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@contextmanager
def start(
    device: str,
    backend: str,
    timeout_minutes: float = 10,
    process_group: bool = False,
    cpu_tensors: bool = False,
    tf32: bool = False,
    layout: Layout = Layout(),
) -> Iterator[Ranks]:
    """Pick this rank's device, join the process group, and leave it at the end.

    timeout_minutes: how long to wait for other ranks, here and in every collective; 0 means ten.
    process_group: make one for a single process too; DDP, FSDP2 and DeepSpeed need it.
    cpu_tensors: ranks on GPUs also reduce tensors in host memory, as FSDP2's offloaded gradient norm does.
    """
    ranks = Ranks(rank(), local_rank(), world_size(), pick_device(device, local_rank(), world_size()), None, layout)
    set_up(ranks.device, tf32)
    if process_group:  # DeepSpeed reads its device from the environment
        os.environ["DS_ACCELERATOR"] = ranks.device.type
        os.environ.setdefault("LOCAL_RANK", str(ranks.device.index or 0))
    if ranks.world_size == 1 and not process_group:
        yield ranks
        return
    timeout = timedelta(minutes=timeout_minutes or 10, seconds=30)  # after the watchdog, whose report says more
    ranks = join(ranks, backend, timeout, cpu_tensors)
    stopped = None
    try:
        yield ranks
    except Stopped as reason:  # on all ranks; after another error some may be gone, and the barrier would wait for them
        stopped = reason
    dist.barrier()
    # gloo's group lives until `run` exits: destroyed while DDP still refers to it, it now and then waits forever for
    # its own thread, which waits for the GIL.
    if ranks.control:  # the group is NCCL's
        dist.destroy_process_group()
    if stopped:
        raise stopped


def set_up(device: torch.device, tf32: bool) -> None:
    """Apply what torch reads from the environment at the first allocation, and the precision of float32 matmuls."""
    if device.type == "cuda":
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # less memory is lost to fragmentation
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    elif device.type == "cpu":  # huge pages for large tensors: page faults took a third of a ZeRO step
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def leave_out_compiler() -> None:
    """Keep torch's compiler, which optimizers and DeepSpeed load to decorate functions, unloaded: 1 to 2 s, 65 MB."""

    def unchanged(function: Callable | None = None, *_: Any, **__: Any) -> Callable:
        return unchanged if function is None else function  # a decorator, with or without arguments

    for method in vars(Optimizer).values():
        if original := getattr(method, "__wrapped__", None):
            original.__dynamo_disable = original  # what the compiler would have answered; torch keeps it there
    Adam.step = torch.no_grad()(inspect.unwrap(Adam.step))  # type: ignore[method-assign]  # AdamW's, too
    modules: Any = torch
    modules.compile = modules.compiler.disable = modules._disable_dynamo = unchanged


def join(ranks: Ranks, backend: str, timeout: timedelta, cpu_tensors: bool) -> Ranks:
    if backend == "auto":
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    if backend == "nccl" and ranks.device.type != "cuda":
        raise ConfigError(f"backend = 'nccl': needs GPUs, this run is on {ranks.device.type}; set --backend=auto")
    bound = ranks.device if backend == "nccl" else None
    backends = "cpu:gloo,cuda:nccl" if bound and cpu_tensors else backend
    try:
        store = local_store(ranks, timeout) if ranks.world_size in (1, local_world_size()) else None
        dist.init_process_group(backends, None, timeout, ranks.world_size, ranks.rank, store, device_id=bound)
    except (RuntimeError, OSError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        fix = f"every host must reach that address; name the right network in {backend.upper()}_SOCKET_IFNAME"
        if "address already in use" in reason.lower():
            fix = "another run uses the port; give the launcher another one with --master_port"
        elif backend == "nccl" and (size := shutil.disk_usage(SHARED_MEMORY).total) < NCCL_SHARED_MEMORY:
            fix = f"{SHARED_MEMORY} has {size >> 20} MiB, too little for NCCL; {LARGER_SHARED_MEMORY}"
        raise NodeError(f"rank {ranks.rank} could not join the others at {address} ({reason}); {fix}") from None
    return replace(ranks, control=dist.new_group(backend="gloo", timeout=timeout) if bound else None)


def local_store(ranks: Ranks, timeout: timedelta) -> dist.Store | None:
    """Store of one machine's ranks; None: torchrun has one. They accept no connections from elsewhere."""
    # torch's own store would listen on every network, and gloo on that of the host name
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    if ranks.world_size == 1:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    address = "127.0.0.1", int(os.environ["MASTER_PORT"])
    listening = socket.create_server(address).detach() if ranks.main else None
    return dist.TCPStore(*address, ranks.world_size, ranks.main, timeout, master_listen_fd=listening)


def pick_device(name: str, local_rank: int, ranks: int) -> torch.device:
    """This rank's device. Raises ConfigError where it does not exist, or torch cannot use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if name == "cpu" and NVIDIA_DEVICE.exists() and not hidden:  # an error, instead of training on the CPU
            problem = "torch cannot use the NVIDIA GPU of this machine"
            fix = f"install a driver and a torch of one CUDA version (torch has {torch.version.cuda})"
            raise ConfigError(f"device = 'auto': {problem}; {fix}, or set --device=cpu")
    if not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", name):
        raise ConfigError(f"device = {name!r}: unknown; write auto, cpu, cuda, cuda:1 or mps")
    device = torch.device(name)
    if device.type == "cuda":
        visible, local_ranks = torch.cuda.device_count(), local_world_size()
        index = local_rank if ranks > 1 else device.index or 0
        if max(index + 1, local_ranks) > visible:  # the same condition on every rank: none waits for one that failed
            request = f"{local_ranks} ranks on this machine" if ranks > 1 else f"device = {name!r}"
            raise ConfigError(f"{request}: {visible} GPUs are visible; use fewer ranks, or --device=cpu")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device = 'mps': not available on this machine; use --device=cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matmuls. Raises ConfigError where the device does not support it."""
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return torch.float32 if device.type != "cuda" else torch.bfloat16 if has_bf16 else torch.float16
    if name == "bfloat16" and not has_bf16:
        gpu = torch.cuda.get_device_name(device)
        raise ConfigError(f"dtype = 'bfloat16': not supported by {gpu}; use float16 or float32")
    return getattr(torch, name)


def describe_error(error: Exception) -> str:
    """The message for the user. Raises the error again if it is an OSError that is a bug."""
    if not isinstance(error, OSError):
        return str(error)
    if error.errno not in USERS_ERRNOS:
        raise error
    fix = "; free some space or choose another --out_dir" if error.errno in CANNOT_WRITE else ""
    return f"{error.filename or 'input/output'}: {error.strerror or error}{fix}"


def open_streams() -> None:
    """Make stdout and stderr usable: closed with >&-, or in ASCII only."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # without this, a file of the run would take its place
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")  # also for a path that is not UTF-8


def run(main: Callable[[], None]) -> None:
    """Run a script. A user's error is printed once and every rank exits with status 2; a bug keeps its traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # during the imports, it ended the script at once
    open_streams()
    this_rank, ranks, status, message = 0, 1, USER_ERROR, ""
    try:
        this_rank = rank()  # a rank that cannot read its number reports that
        ranks = check_launch()
        main()
        status = 0
    except UserError as error:  # raised on every rank: from the settings, which all ranks read, or by `together`
        reporter = isinstance(error, RankError) or (local_rank() if isinstance(error, NodeError) else this_rank) == 0
        message = str(error) if reporter else ""
    except (DataError, OSError) as error:  # on this rank only: the launcher ends the others
        message = ("" if ranks == 1 else f"rank {this_rank}: ") + describe_error(error)
    except Stopped as reason:
        status = STOPPED
        if this_rank == 0:
            print(reason)
    except RuntimeError as error:
        if ranks == 1 or not any(text in str(error) for text in LOST_RANK):
            raise
        status = LOST  # a collective failed because a rank went away; that rank reports the cause
        if local_rank() == 0:
            message = f"rank {this_rank} lost another rank: {str(error).splitlines()[0].partition(' This is ')[0]}"
    except KeyboardInterrupt:  # die by the signal, as shells expect, without a traceback from every rank
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    if message:
        print(f"error: {message}", file=sys.stderr)
    elif status and this_rank and {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & os.environ.keys():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(REPORT_SECONDS)  # torchrun and deepspeed kill the rank that reports as soon as this one ends
    if ranks > 1 or dist.is_initialized():  # interpreter shutdown with a live group may abort, or wait for other ranks
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
