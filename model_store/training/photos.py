"""Photographs for training: a folder decoded once into memory on the training device, random crops from it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from model_store.images import photo_paths
from model_store.training.held_out import is_held_out
from service.codec.config import STRIDE


def check_crop(side: int) -> None:
    """Raises:
    ValueError: the transforms take no crop of this side.
    """
    if side % STRIDE:
        raise ValueError(f"expected a crop that is a multiple of {STRIDE}, got {side}")


def load_photo(path: Path) -> Tensor | None:
    """(3, H, W) uint8, upright, taken for sRGB whatever profile it has; None for one that the evaluation measures on.

    Raises:
        ValueError: it cannot be read, or has more than 8 bits.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                raise ValueError("expected 8 bits a channel")
            if is_held_out(image):
                return None
            return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).contiguous()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {error}") from error


def _downsampled(photo: Tensor) -> Tensor:
    return F.avg_pool2d(photo[None].float(), 2)[0].round().to(torch.uint8)


def tone_jittered(x: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """A share of clean crops (B, 3, H, W) darker, brighter or flatter than they were, and still clean, of 8 bits.

    A dull sky or a dim room is no degradation; without these a model learns to brighten and stretch whatever is flat.
    """
    chosen, gamma, contrast, pivot = torch.rand(4, len(x), 1, 1, 1, generator=generator).to(x.device)
    contrast = 0.6 + 0.4 * contrast  # from 0.25 on, haze was no longer told from a flat scene
    changed = x ** (0.5 * 5**gamma) * contrast + pivot * (1 - contrast)
    return torch.where(chosen < share, (changed * 255).round() / 255, x)


class PhotoPool:
    """Every photo of a folder that is at least `crop` on both sides and not held out, as uint8 on `device`.

    Photos of at least twice that are also held at half their size: a crop then shows more of a scene, and finer detail.
    A photo is drawn with a probability proportional to the square root of its pixels.
    """

    def __init__(self, folder: Path, crop: int, device: torch.device) -> None:
        self.crop = crop
        with ThreadPoolExecutor() as pool:
            photos = [photo for photo in pool.map(load_photo, photo_paths(folder)) if photo is not None]
        self.photos = [photo.to(device) for photo in photos if min(photo.shape[1:]) >= crop]
        self.photos += [_downsampled(photo) for photo in self.photos if min(photo.shape[1:]) >= 2 * crop]
        if not self.photos:
            raise ValueError(f"expected photographs of at least {crop}x{crop} below {folder}, found none")
        self.weights = torch.tensor([float(photo.shape[1] * photo.shape[2]) ** 0.5 for photo in self.photos])

    def crops(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """(count, 3, size, size) float32 in [0, 1]: random places and flips. `generator` is a CPU one."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator).tolist()
        crops = []
        for index in chosen:
            photo = self.photos[index]
            draw = torch.rand(4, generator=generator).tolist()
            top = int(draw[0] * (photo.shape[1] - size + 1))
            left = int(draw[1] * (photo.shape[2] - size + 1))
            crop = photo[:, top : top + size, left : left + size]
            if draw[2] < 0.5:
                crop = crop.flip(2)
            if draw[3] < 0.5:
                crop = crop.transpose(1, 2)
            crops.append(crop)
        return torch.stack(crops).float() / 255
