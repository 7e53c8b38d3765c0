"""What the hardware can do and has used."""

import re
import resource
import sys

import torch

# Dense matmul peaks in TFLOP/s, (bfloat16 and float16, float32 as TF32 where there is one), from NVIDIA's data sheets.
# The SXM variants, but for names that say otherwise. First match wins, so longer names stand first.
PEAK_TFLOPS = {
    "B200": (2250, 1125),
    "B100": (1750, 875),
    "GH200": (989, 494),
    "H200 NVL": (835, 417),
    "H200": (989, 494),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 417),
    "H100": (989, 494),
    "H800 PCIe": (756, 378),
    "H800": (989, 494),
    "A100": (312, 156),
    "A800": (312, 156),
    "A40": (149.7, 74.8),
    "A30": (165, 82),
    "A10G": (70, 35),
    "A10": (125, 62.5),
    "L40S": (362, 183),
    "L40": (181, 90.5),
    "L4": (121, 60),
    "RTX 6000 Ada": (364, 182),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71, 35.6),
    "V100-PCIE": (112, 14),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense matmuls in dtype; None where unknown: no MFU rather than a wrong one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"\b(Laptop|Ti|SUPER|Max-Q|D|MIG)\b", name):  # other chips under the same name, or parts of one
        return None
    for part, (half, single) in PEAK_TFLOPS.items():
        if re.search(rf"\b{part}\b", name):
            if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
                return None
            return (single if dtype == torch.float32 else half) * 1e12
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process held so far: allocated on the GPU, or resident where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
