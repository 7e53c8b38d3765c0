"""Devices and links by name. Matmul peaks are those of training/devices.py."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from training.devices import PEAK_TFLOPS
from training.errors import UserError
from training.units import rate


@dataclass(frozen=True)
class Device:
    name: str
    memory: float  # bytes
    memory_rate: float  # bytes a second
    link: str  # to the others of its node
    half: float  # FLOP/s of dense matmuls in bf16 and fp16
    single: float  # in fp32, as TF32 where there is one
    kind: str = "cuda"
    has_bf16: bool = True

    def flops(self, dtype: torch.dtype) -> float:
        return self.single if dtype == torch.float32 else self.half


# name -> (name in PEAK_TFLOPS, memory in GB, memory's GB/s, link between the GPUs of a node), from NVIDIA's data sheets
TABLE = {
    "B200": ("B200", 180, 8000, "nvlink5"),
    "H200": ("H200", 141, 4800, "nvlink4"),
    "GH200": ("GH200", 96, 4000, "nvlink4"),
    "H100": ("H100", 80, 3350, "nvlink4"),
    "H100-PCIe": ("H100 PCIe", 80, 2000, "pcie5"),
    "H800": ("H800", 80, 3350, "nvlink3.400"),
    "A100-80GB": ("A100", 80, 2039, "nvlink3"),
    "A100-40GB": ("A100", 40, 1555, "nvlink3"),
    "A800": ("A800", 80, 2039, "nvlink3.400"),
    "L40S": ("L40S", 48, 864, "pcie4"),
    "L40": ("L40", 48, 864, "pcie4"),
    "A40": ("A40", 48, 696, "pcie4"),
    "RTX-6000-Ada": ("RTX 6000 Ada", 48, 960, "pcie4"),
    "V100-32GB": ("V100", 32, 900, "nvlink2"),
    "V100-16GB": ("V100", 16, 900, "nvlink2"),
    "A30": ("A30", 24, 933, "pcie4"),
    "A10G": ("A10G", 24, 600, "pcie4"),
    "A10": ("A10", 24, 600, "pcie4"),
    "L4": ("L4", 24, 300, "pcie4"),
    "RTX-4090": ("RTX 4090", 24, 1008, "pcie4"),
    "RTX-3090": ("RTX 3090", 24, 936, "pcie4"),
    "T4": ("T4", 16, 320, "pcie3"),
}
SHORT = {"A100": "A100-80GB", "V100": "V100-32GB", "RTX4090": "RTX-4090", "RTX3090": "RTX-3090"}
WITHOUT_BF16 = ("V100-32GB", "V100-16GB", "T4")
# Nominal, one way: half of what NVIDIA's data sheets say of both; PCIe with 16 lanes.
LINKS = {
    "nvlink5": "900GB",
    "nvlink4": "450GB",
    "nvlink3": "300GB",
    "nvlink3.400": "200GB",  # of the A800 and H800
    "nvlink2": "150GB",
    "pcie5": "64GB",
    "pcie4": "32GB",
    "pcie3": "16GB",
    "xdr": "800Gb",  # InfiniBand
    "ndr": "400Gb",
    "hdr": "200Gb",
    "edr": "100Gb",
    "efa-p5": "3200Gb",  # of a node
    "efa-p4d": "400Gb",
    "400gbe": "400Gb",
    "200gbe": "200Gb",
    "100gbe": "100Gb",
    "25gbe": "25Gb",
    "10gbe": "10Gb",
    "1gbe": "1Gb",
}


def device(name: str) -> Device:
    """UserError where it is not in the table: then numbers are needed."""
    known = {key.lower(): key for key in (*TABLE, *SHORT)}
    if name.lower() not in known:
        hint = nearest(name.lower(), known)
        numbers = "--tflops=312 --gpu-memory=80GB --memory-bandwidth=2TB --node-link=300GB"
        cpu = "; for CPU ranks measure them, --calibrate" if name.lower() == "cpu" else ""
        raise UserError(f"device = {name!r}: not in the table; {hint}write its numbers, {numbers}{cpu}")
    key = known[name.lower()]
    key = SHORT.get(key, key)
    part, memory, memory_rate, link = TABLE[key]
    half, single = (1e12 * peak for peak in PEAK_TFLOPS[part])
    return Device(key, memory * 1e9, memory_rate * 1e9, link, half, single, has_bf16=key not in WITHOUT_BF16)


def link(text: str, option: str) -> float:
    """Bytes a second of a link by its name, or by its number; UserError where it is neither."""
    if text.lower() in LINKS:
        return rate(LINKS[text.lower()])
    try:
        return rate(text)
    except UserError:
        hint = nearest(text.lower(), LINKS)
        raise UserError(
            f"{option} = {text!r}: not in the table; {hint}write a number, {option}=400Gb or 50GB"
        ) from None


def nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {found[0]}? Or " if found else ""
