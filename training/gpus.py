"""GPUs by name: matmul peaks, memory, links; from data sheets, for MFU and tools.plan."""

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    half: float  # TFLOP/s of dense matmuls in bfloat16 and float16
    tf32: float  # TFLOP/s in float32 on tensor cores (TF32); where there is no TF32, the same as fp32
    fp32: float  # TFLOP/s in full float32
    memory: float  # GB
    bandwidth: float  # GB/s of its memory
    link: float  # GB/s in one direction to the other GPUs of a node: half of a data sheet's NVLink, or 16 lanes of PCIe
    has_bf16: bool = True

    def peak(self, dtype: torch.dtype, tf32: bool) -> float:
        """FLOP/s of dense matmuls; tf32: whether float32 matmuls may use TF32."""
        return 1e12 * (self.half if dtype != torch.float32 else self.tf32 if tf32 else self.fp32)


# From NVIDIA's data sheets, without sparsity; the SXM variants where the name does not say otherwise. `find_device`
# takes the first row whose words are all in a name, so a variant stands before the plain name.
DEVICES = {
    "GB300": Device(2500, 1250, 80, 279, 8000, 900),
    "B300": Device(2250, 1125, 75, 270, 8000, 900),
    "GB200": Device(2500, 1250, 80, 186, 8000, 900),
    "B200": Device(2250, 1125, 75, 180, 8000, 900),
    "B100": Device(1750, 875, 60, 192, 8000, 900),
    "GH200": Device(989, 494, 67, 96, 4000, 450),
    "H200 NVL": Device(835, 417, 60, 141, 4800, 450),
    "H200": Device(989, 494, 67, 141, 4800, 450),
    "H100 PCIe": Device(756, 378, 51, 80, 2000, 64),
    "H100 NVL": Device(835, 417, 60, 94, 3900, 300),
    "H100": Device(989, 494, 67, 80, 3350, 450),
    "H800 PCIe": Device(756, 378, 51, 80, 2000, 64),
    "H800": Device(989, 494, 67, 80, 3350, 200),
    "H20": Device(148, 74, 44, 96, 4000, 450),
    "A100 40GB": Device(312, 156, 19.5, 40, 1555, 300),
    "A100": Device(312, 156, 19.5, 80, 2039, 300),
    "A800": Device(312, 156, 19.5, 80, 2039, 200),
    "L40S": Device(362, 183, 91.6, 48, 864, 32),
    "L40": Device(181, 90.5, 90.5, 48, 864, 32),
    "A40": Device(149.7, 74.8, 37.4, 48, 696, 32),
    "RTX 6000 Ada": Device(364, 182, 91.1, 48, 960, 32),
    "A6000": Device(154.8, 77.4, 38.7, 48, 768, 32),
    "V100 PCIE": Device(112, 14, 14, 32, 900, 16, has_bf16=False),
    "V100 16GB": Device(125, 15.7, 15.7, 16, 900, 150, has_bf16=False),
    "V100": Device(125, 15.7, 15.7, 32, 900, 150, has_bf16=False),
    "A30": Device(165, 82, 10.3, 24, 933, 32),
    "A10G": Device(70, 35, 35, 24, 600, 32),
    "A10": Device(125, 62.5, 31.2, 24, 600, 32),
    "L4": Device(121, 60, 30.3, 24, 300, 32),
    "RTX 5090": Device(209.5, 104.8, 104.8, 32, 1792, 64),
    "RTX 4090": Device(165.2, 82.6, 82.6, 24, 1008, 32),
    "RTX 3090": Device(71, 35.6, 35.6, 24, 936, 32),
    "T4": Device(65, 8.1, 8.1, 16, 320, 16, has_bf16=False),
}
OTHER_CHIPS = {"laptop", "ti", "super", "max", "d", "mig"}  # words that mean a different chip, or a part of one


def find_device(name: str) -> str | None:
    """The key in DEVICES for a name as CUDA reports it ("NVIDIA A100-SXM4-40GB") or a user writes it ("a100-40gb")."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    rows = (key for key in DEVICES if set(key.lower().split()) <= words and not words & OTHER_CHIPS)
    return next(rows, None)
