"""DeepSpeed's C++ ops: those that a run needs are compiled before anything is allocated, once, with a word before.

DeepSpeed itself is passed in by train_deepspeed.py: nothing here imports it.
"""

import fcntl
import functools
import logging
import shutil
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import cpuinfo
from torch.utils import cpp_extension

from training.deepspeed_rules import dotted
from training.distributed import Ranks
from training.errors import UserError

PARTS = {"async_io": ["pin_memory"]}  # ops that another one compiles and loads with itself
LOAD = cpp_extension.load


def load(deepspeed: ModuleType, config: dict[str, Any], ranks: Ranks) -> None:
    """On every rank; the first of each node compiles. Raises UserError with the fix where that does not work."""
    logging.getLogger(cpp_extension.__name__).setLevel(logging.ERROR)  # a page on other compilers than g++
    ops = needed(config, ranks.device.type)
    if ops:  # the builders ask for the CPU's name and abilities five times over, a second each
        cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
        cpuinfo.get_cpu_info()
    for op, builder in ops.items():
        made = deepspeed.accelerator.get_accelerator().create_op_builder(builder)
        built = deepspeed.git_version_info.installed_ops.get(op)  # DS_BUILD_... = 1 when DeepSpeed was installed
        for turn in (True, False):
            with ranks.together():
                if turn == (ranks.local_rank == 0):
                    build(op, made, announce=not built)


def needed(config: dict[str, Any], device: str) -> dict[str, str]:
    """op -> DeepSpeed's builder of it."""
    zero = config.get("zero_optimization", {})
    offload = {what: dotted(zero, f"offload_{what}.device") for what in ("optimizer", "param")}
    ops = {}
    if "nvme" in offload.values():
        ops["async_io"] = "AsyncIOBuilder"  # first: what it lacks is seen before another is compiled
    if "optimizer" in config and not dotted(config, "optimizer.params.torch_adam"):
        if offload["optimizer"] in ("cpu", "nvme"):
            ops["cpu_adam"] = "CPUAdamBuilder"
        elif device in ("cuda", "cpu"):
            ops["fused_adam"] = "FusedAdamBuilder"
    return ops


def build(op: str, builder: Any, announce: bool) -> None:
    folders = [Path(cpp_extension._get_build_directory(name, verbose=False)) for name in (op, *PARTS.get(op, ()))]
    with (folders[0].parent / "nanozero.lock").open("w") as ours, said_if_slow(op, folders[0], announce):
        # torch's own lock is a file that a killed compilation leaves behind, and for which all later ones would wait
        # for ever. Ours ends with the process that holds it: who has it may remove that.
        fcntl.flock(ours, fcntl.LOCK_EX)
        for folder in folders:
            (folder / "lock").unlink(missing_ok=True)
        try:
            cpp_extension.load = functools.partial(without_symbols, LOAD)
            builder.load(verbose=False)
        except Exception as error:
            raise UserError(f"{op}, a C++ op of DeepSpeed's that this run needs: {reason(op, error)}") from None


@contextmanager
def said_if_slow(op: str, folder: Path, announce: bool) -> Iterator[None]:
    """At once where it must be compiled; else after seconds: it may have been compiled for another torch."""
    text = f"compiling {op} of DeepSpeed, once: half a minute, on few cores more"
    timer = threading.Timer(5.0 if (folder / f"{op}.so").exists() else 0.0, print, [text], {"flush": True})
    if announce:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def without_symbols(load: Callable, *arguments: Any, extra_cflags: list[str], **options: Any) -> Any:
    """DeepSpeed asks for a debugger's symbols, which are a third of the compiler's work."""
    return load(*arguments, extra_cflags=[flag for flag in extra_cflags if flag != "-g"], **options)


def reason(op: str, error: Exception) -> str:
    """What is missing, and the fix."""
    compiler = cpp_extension.get_cxx_compiler()
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    without = '; or set "torch_adam": true in optimizer.params' if op != "async_io" else ""
    if not shutil.which(compiler.split()[0]):
        return f"no compiler ({compiler}); apt-get install g++{without}"
    if not cpp_extension.is_ninja_available():
        return f"no ninja; pip install ninja{without}"
    if not headers.exists():
        return f"no Python headers ({headers}); apt-get install python3-dev{without}"
    if op == "async_io" and "compatible" in str(error):
        return "no libaio; apt-get install libaio-dev"
    if "CUDA" in type(error).__name__:
        return f"{' '.join(str(error).split())}; install the CUDA toolkit that torch was built with{without}"
    lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()]
    return (lines or [str(error)])[-1][:300] + without
