"""The matmul ceiling: the FLOP/s that this device reaches in matmuls of this dtype, whatever its data sheet says."""

import time

import torch

SIZES = {"cuda": (2048, 4096, 8192, 16384), "cpu": (512, 1024)}  # of square matrices
SECONDS = 0.4  # for each size; all ranks measure at the same time, as they compute in a run


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best size, 2 n^3 FLOPs a matmul."""
    return max(rate(device, dtype, size) for size in SIZES.get(device.type, SIZES["cpu"]))


def rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    matrix = torch.randn(size, size, device=device).to(dtype)  # of zeros, a GPU would be faster
    seconds, count, best, until = 0.0, 1, 0.0, time.perf_counter() + SECONDS
    while not best or time.perf_counter() < until:
        since = time.perf_counter()
        for _ in range(count):
            torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - since
        best = max(best, 2 * size**3 * count / seconds)
        count = 10 if device.type == "cuda" else 1
    return best
