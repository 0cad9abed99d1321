"""Photographs as arrays and tensors: files below a folder, reading, conversion, PSNR."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Photo = NDArray[np.uint8]
"""An sRGB photo, (H, W, 3)."""

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"}


def photo_paths(folder: Path) -> list[Path]:
    """All photographs below a folder, sorted.

    Raises:
        ValueError: the folder holds none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"expected photographs below {folder}, found none")
    return paths


def read_rgb(path: Path) -> Photo:
    """A file as (H, W, 3) uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def as_tensor(photo: Photo) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 255


def as_photo(x: Tensor) -> Photo:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return (x * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def psnr(a: Photo, b: Photo) -> float:
    """PSNR in RGB, dB."""
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))))
