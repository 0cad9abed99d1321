"""What a benchmark says of the machine it ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from service.codec.device import transform_precision


def result_file(name: str, suffix: str = "json") -> Path:
    """Where a benchmark leaves what it found: a file per precision of the transforms, which depends on the CPU."""
    precision = transform_precision(torch.device("cpu"))
    return Path(__file__).parent / "results" / f"{name}-{precision}.{suffix}"


def machine() -> dict[str, object]:
    """CPU, cores, threads and the versions that count."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "compressai", "numpy", "pillow")},
    }
