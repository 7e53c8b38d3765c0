"""What a device can do and what a process took of it: matmul peak, time of a matmul, peak memory."""

import resource
import sys
import time

import torch


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense matmuls in dtype with the current TF32 setting; None where unknown: no MFU, not a wrong one."""
    if device.type != "cuda":
        return None
    from training.gpus import DEVICES, find_device

    key = find_device(torch.cuda.get_device_name(device))
    if key is None or (dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False)):
        return None
    return DEVICES[key].peak(dtype, tf32=torch.get_float32_matmul_precision() != "highest")


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has used so far: allocated on the GPU, or resident if the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def time_matmul(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """Seconds per matmul of square matrices of random normal numbers (a GPU multiplies zeros faster)."""
    matrix = torch.randn(size, size, device=device).to(dtype)
    torch.mm(matrix, matrix)  # the first call sets up the library
    synchronize(device)
    since = time.perf_counter()
    for _ in range(repeats):
        torch.mm(matrix, matrix)
    synchronize(device)
    return (time.perf_counter() - since) / repeats


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
