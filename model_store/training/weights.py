"""The weights of a run in a file small enough to keep in the repository, from which a later run can start."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def keep_weights(checkpoint: Path, path: Path) -> None:
    """Write a checkpoint's EMA weights as float16 safetensors, without the optimizer: about 2 bytes per parameter.

    Raises:
        ValueError: a weight is beyond float16.
    """
    mean: dict[str, Tensor] = torch.load(checkpoint, map_location="cpu", weights_only=True)["ema"]
    halved = {name: value.half().contiguous() if value.is_floating_point() else value for name, value in mean.items()}
    for name, value in halved.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"expected weights within float16, {name} reaches {float(mean[name].abs().max()):g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(halved, path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights to start a run from: a file of `keep_weights`, or the EMA of a checkpoint."""
    if path.suffix != ".safetensors":
        return dict(torch.load(path, map_location="cpu", weights_only=True)["ema"])
    return {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
