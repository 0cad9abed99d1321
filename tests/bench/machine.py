"""What a benchmark says of what it ran: the machine and the model."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from model_store.index import read_index
from service.codec.device import transform_precision
from service.settings import DEFAULT_STORE


def result_file(name: str, suffix: str = "json") -> Path:
    """Where a benchmark leaves what it found: a file per precision of the transforms, which depends on the CPU."""
    precision = transform_precision(torch.device("cpu"))
    return Path(__file__).parent / "results" / f"{name}-{precision}.{suffix}"


def machine() -> dict[str, object]:
    """CPU, cores, threads, the versions that count, and the model of whoever names none."""
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
        "default_model": read_index(DEFAULT_STORE)["default"],
        **{name: version(name) for name in ("torch", "compressai", "numpy", "pillow")},
    }
