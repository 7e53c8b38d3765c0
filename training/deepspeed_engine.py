"""What surrounds a DeepSpeed engine: C++ ops, log file, checkpoint files, swap folders. Does not import DeepSpeed."""

import fcntl
import functools
import logging
import os
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import cpuinfo
import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils import cpp_extension

from training.checkpoint import CheckpointWriter
from training.deepspeed_config import DeepSpeedTrainConfig, Json, describe_json, dotted, nvme_blocks
from training.distributed import Ranks
from training.errors import UserError
from training.optim import make_optimizer


def load(deepspeed: ModuleType, config: Json, ranks: Ranks) -> None:
    """Load a run's ops; the first rank of each node compiles, the others wait. A collective. Raises UserError."""
    logging.getLogger(cpp_extension.__name__).setLevel(logging.ERROR)  # a page about compilers other than g++
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)  # DeepSpeed calls it several times, 1.1 s each
    if ops := needed(config, ranks.device.type):
        cpuinfo.get_cpu_info()  # on all ranks at once; below, they take turns
    for op, builder in ops.items():
        for first in (True, False):
            with ranks.together():
                if first == (ranks.local_rank == 0):
                    build(op, builder, deepspeed)


def needed(config: Json, device: str) -> dict[str, str]:
    """op -> name of its builder in DeepSpeed; device: cpu or cuda."""
    _, *devices = describe_json(config)
    ops = {}
    if "nvme" in devices:
        ops["async_io"] = "AsyncIOBuilder"  # first, so that a missing libaio is reported before others are compiled
    if "optimizer" in config and not dotted(config, "optimizer.params.torch_adam"):
        if devices[0] != "gpu":
            ops["cpu_adam"] = "CPUAdamBuilder"
        elif device in ("cuda", "cpu"):
            ops["fused_adam"] = "FusedAdamBuilder"
    return ops


def build(op: str, builder_name: str, deepspeed: ModuleType) -> None:
    """Load an op, which is compiled before unless it was installed with DeepSpeed or compiled by an earlier run."""
    accelerator = deepspeed.accelerator.get_accelerator()
    builder = accelerator.create_op_builder(builder_name)
    if home := cpp_extension.CUDA_HOME:  # libcuda.so for the linker, which a driver alone does not have
        os.environ["LIBRARY_PATH"] = f"{home}/lib64/stubs:{os.environ.get('LIBRARY_PATH', '')}"
    installed = deepspeed.git_version_info.installed_ops.get(op)  # by DS_BUILD_...=1
    ops = ["async_io", "pin_memory"] if op == "async_io" else [op]  # its builder compiles both
    folders = [Path(cpp_extension._get_build_directory(name, False)) for name in ops]
    # torch locks by creating a file. A killed compilation leaves it behind, and all later ones wait forever. The
    # kernel releases ours when its process ends, so its owner may delete torch's.
    with (folders[0].parent / "nanozero.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for folder in folders:
            (folder / "lock").unlink(missing_ok=True)
        missing = not installed and not (folders[0] / f"{op}.so").exists()
        if missing:
            print(f"compiling {op} of DeepSpeed, once; this takes about a minute", flush=True)
        flags = builder.cxx_args
        # Without debug symbols cpu_adam compiles in 47 instead of 64 s on one core.
        builder.cxx_args = lambda: [flag for flag in flags() if flag != "-g"]
        try:
            if missing and not builder.is_compatible(verbose=False):  # before the ops that it consists of are compiled
                raise RuntimeError(f"{op} is not compatible with this machine")
            builder.load(verbose=False)
        except Exception as error:
            why = reason(op, error, accelerator.device_name())
            raise UserError(f"cannot compile {op}, a C++ op of DeepSpeed: {why}") from None


def reason(op: str, error: Exception, device: str) -> str:
    """Why an op cannot be compiled, and the fix."""
    compiler = cpp_extension.get_cxx_compiler()
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    or_torch = '; or set "torch_adam": true in optimizer.params' if op != "async_io" else ""
    if not shutil.which(compiler.split()[0]):
        return f"no compiler ({compiler}); apt-get install g++{or_torch}"
    if not headers.exists():
        return f"the Python headers are missing ({headers}); apt-get install python3-dev{or_torch}"
    if op == "async_io" and "compatible" in str(error):
        return "libaio is missing; apt-get install libaio-dev"
    nvcc = Path(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    if device == "cuda" and op != "cpu_adam" and not nvcc.is_file():
        return f"no CUDA toolkit ({nvcc}); install that of CUDA {torch.version.cuda}, and set CUDA_HOME{or_torch}"
    lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
    return lines[-1][:300] + or_torch


class DeepSpeedLog:
    """Writes DeepSpeed's messages and profiles to out_dir/deepspeed.log. Create it after DeepSpeed is imported."""

    def __init__(self, cfg: DeepSpeedTrainConfig, ranks: Ranks):
        to_file = ranks.main and not (cfg.verbose or cfg.eval_only)
        self.file: Any = (Path(cfg.out_dir) / "deepspeed.log").open("a", buffering=1) if to_file else None
        level = logging.INFO if cfg.verbose else logging.WARNING if self.file else logging.ERROR
        logger: Any = logging.getLogger("DeepSpeed")
        logger.setLevel(level)
        for handler in logger.handlers:
            handler.setLevel(level)
            if self.file:
                handler.setStream(self.file)
        if not cfg.verbose:
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
            warnings.filterwarnings("ignore", "c10d::broadcast_")  # AutoTP's, inside of a pipeline's stage

    def redirect(self) -> AbstractContextManager:
        """Write what DeepSpeed prints to the file."""
        return redirect_stdout(self.file) if self.file else nullcontext()


@contextmanager
def writing(engine: Any, writer: CheckpointWriter) -> Iterator[None]:
    """Wrap engine.save_checkpoint, so that `writer` gets the files, and writes them after its barriers."""

    def save(state_dict: Any, path: str) -> None:
        if Path(path).name.startswith("layer_"):  # weights of a stage or an expert, which are with the optimizer's, too
            return
        writer.write(str(Path(path).relative_to(writer.folder)), state_dict)

    engine.checkpoint_engine.save = save
    engine._copy_recovery_script = lambda folder: None  # else zero_to_fp32.py and zero_to_torch.py are copied there
    yield
    rank = torch.distributed.get_rank()
    for path in (writer.folder / "offloaded_tensors" / f"rank{rank:02d}").glob("*"):  # DeepSpeed copied it from NVMe
        writer.add(path)


def replica_group(ranks: Ranks) -> Any:
    """The ranks among which ZeRO partitions, which have the same part of each matrix. None: all ranks."""
    if ranks.layout.tensor == 1:
        return None
    by_group = torch.arange(ranks.world_size).view(-1, ranks.layout.tensor).T
    return torch.distributed.new_subgroups_by_enumeration(by_group.tolist())[0]


def own_optimizer(model: torch.nn.Module, cfg: DeepSpeedTrainConfig, config: Json) -> torch.optim.Optimizer | None:
    """The optimizer that DeepSpeed gets; None: it makes the one that the JSON names."""
    if cfg.optimizer == "muon" and describe_json(config)[0] > 0:
        from training.deepspeed_muon import make_muon

        return make_muon(model, cfg)
    return None if "optimizer" in config else make_optimizer(model, cfg)


def describe_optimizer(engine: Any) -> str:
    """ "AdamW of torch, WarmupLR"."""
    optimizer, suffix = type(engine.basic_optimizer), f", {type(engine.lr_scheduler).__name__}"
    return f"{optimizer.__name__} of {optimizer.__module__.split('.')[0]}{suffix if engine.lr_scheduler else ''}"


def keep_norm(engine: Any) -> None:
    """Let ZeRO-0 keep the gradient norm that it clips by; computing it again takes 4 %. Other stages keep theirs."""

    def clip() -> None:
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())

    engine.clip_fp32_gradients = clip


def client_state(engine: Any) -> dict[str, Any]:
    """What a checkpoint needs besides DeepSpeed's own state, to be read without DeepSpeed."""
    state, optimizer = dict[str, Any](), engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):  # ZeRO-0: not wrapped; its state_dict numbers the parameters
        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        state["optimizer_order"] = [names[p] for group in optimizer.param_groups for p in group["params"]]
    if engine.zero_nvme_offload_optimizer():  # by sub-group: the name of its swap files, and its elements on this rank
        files = [flat.ds_id for flat in optimizer.fp32_partitioned_groups_flat]
        state["sub_groups"] = list(zip(files, optimizer.fp16_partitioned_groups_flat_numel, strict=True))
    if scaler := engine.torch_autocast_z0_gradscaler:
        state["scaler"] = scaler.state_dict()
    return state


@contextmanager
def own_swap_folders(config: Json, ranks: Ranks) -> Iterator[None]:
    """Empty this run's swap folders on NVMe at the start, and remove them at the end; config: resolved.

    DeepSpeed leaves its files there, and copies all files that it finds there into every checkpoint.
    """
    folders = {block["nvme_path"] for block in nvme_blocks(config) if ranks.local_rank == 0}
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    ranks.share(None)  # ranks wait until the folders of their node are empty
    try:
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
