"""Which device to run on, and in which precision its float transforms are fastest."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """`auto`: the first GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def transform_precision(device: torch.device) -> str:
    """`bfloat16` where the hardware multiplies it, else `float32`."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"
