"""What is measured: sets of photos, and what is done to them before any codec sees them. All seeds are fixed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model_store.degradations import EVALUATION, Kind, degrade, to_linear, to_srgb
from model_store.images import Photo, as_photo, as_tensor, read_rgb

SENSOR_LEVELS = (
    (0.0068354, 0.05200081**2),
    (0.01572141, 0.07886314**2),
    (0.03615925, 0.11960187**2),
    (0.08316627, 0.18138522**2),
)
"""Read deviation and shot variance per unit of light of the conditions `sensor-1` to `sensor-4`, in linear light: the
noise of Cheng et al., "Optimizing Image Compression via Joint Learning with Denoising" (ECCV 2022)."""

PUBLISHED: dict[str, tuple[tuple[float, float], ...]] = {
    "sensor-1": ((0.099, 28.04), (0.152, 29.35), (0.224, 30.63), (0.339, 32.30), (0.480, 33.68), (0.644, 34.77)),
    "sensor-2": ((0.099, 27.99), (0.151, 29.25), (0.223, 30.44), (0.334, 31.89), (0.466, 32.98), (0.621, 33.75)),
    "sensor-3": ((0.099, 27.83), (0.152, 28.94), (0.225, 29.90), (0.328, 30.92), (0.448, 31.57), (0.594, 31.98)),
    "sensor-4": ((0.109, 26.77), (0.183, 27.62), (0.284, 27.82), (0.479, 27.91), (0.607, 28.37), (0.819, 28.40)),
}  # fmt: skip
"""(bits per pixel, PSNR) that Cheng et al. report on Kodak, per level; their bits leave out any header.

Their inputs are not quite ours: they decode and encode sRGB by approximations that brighten a photo by some four levels
and make the noise 0.1 to 0.2 dB weaker, draw one field for all photos and do not round to 8 bits. Their model learned
from read deviations up to 0.032 and shot variances up to 0.01, so the levels 3 and 4 are beyond what it had seen; ours
(`TRAINING` in `model_store/degradations.py`) covers all four.
"""

WEATHER = (Kind.RAIN, Kind.SNOW, Kind.HAZE, Kind.LOW_LIGHT)


@dataclass(frozen=True)
class Condition:
    """A degradation and the rate points at which it is measured. `name` is `clean`, `noise-25`, `rain` and so on.

    `pairs` in place of that: the set itself holds degraded photos, `X_noisy.png` or `X_rain.png` beside `X_clean.png`.
    """

    name: str
    rates: tuple[int, ...]


ALL_RATES = tuple(range(1, 9))
EVEN_RATES = (2, 4, 6, 8)
PUBLISHED_RATES = (1, *EVEN_RATES)
"""For comparison with what others published, which begins at 0.1 bits per pixel."""

SETS: dict[str, tuple[Condition, ...]] = {
    "kodak": (
        Condition("clean", ALL_RATES),
        Condition("noise-15", ALL_RATES),
        Condition("noise-25", ALL_RATES),
        Condition("noise-50", ALL_RATES),
        *(Condition(kind.value, EVEN_RATES) for kind in WEATHER),
        *(Condition(name, PUBLISHED_RATES) for name in PUBLISHED),
    ),
    "cbsd68": (
        Condition("clean", ALL_RATES),
        Condition("noise-15", EVEN_RATES),
        Condition("noise-25", ALL_RATES),
        Condition("noise-50", EVEN_RATES),
    ),
    "rain": (Condition("pairs", ALL_RATES),),
    "cc15": (Condition("pairs", ALL_RATES),),
}

MEASURED = ("kodak", "rain", "cc15")
"""What models are measured on. All models so far have learned from most photos of CBSD68 (`model_store/README.md`)."""


@dataclass(frozen=True)
class Sample:
    """One photo under one condition: `degraded` is what a codec gets, `clean` what its output is compared with."""

    photo: str
    condition: Condition
    clean: Photo
    degraded: Photo


def degraded_photo(clean: Photo, index: int, condition: str) -> Photo:
    """Degrade the photo at `index` of its sorted set.

    Noise is numpy's, `default_rng(1234 + index)`, in 8-bit units, or in linear light for `sensor-1` to 4; the rest is
    the project's generator with the ranges of evaluation, seeded with 5678 + index.
    """
    if condition == "clean":
        return clean
    if condition.startswith("noise-"):
        noise = np.random.default_rng(1234 + index).normal(0, int(condition[6:]), clean.shape)
        return np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)
    x = as_tensor(clean)
    if condition.startswith("sensor-"):
        light = to_linear(x[0]).permute(1, 2, 0).double().numpy()
        read, shot = SENSOR_LEVELS[int(condition[7:]) - 1]
        noisy = light + np.random.default_rng(1234 + index).normal(0, 1, light.shape) * np.sqrt(read**2 + shot * light)
        return (to_srgb(torch.from_numpy(noisy)) * 255).round().to(torch.uint8).numpy()
    out = degrade(x, [(Kind(condition),)], torch.Generator().manual_seed(5678 + index), EVALUATION)
    return as_photo(out[0])


PAIRED = ("noisy", "rain")
"""What the degraded photo of a pair is called by, beside `X_clean.png`."""


def clean_paths(root: Path, name: str) -> list[Path]:
    """The clean photos of a set, sorted.

    Raises:
        ValueError: the set is not below root.
    """
    pairs = any(condition.name == "pairs" for condition in SETS[name])
    paths = sorted((root / name).glob("*_clean.png" if pairs else "*.png"))
    if not paths:
        raise ValueError(f"expected PNG photos in {root / name}")
    return paths


def uploaded(path: Path, clean: Photo, index: int, condition: str) -> Photo:
    """What a codec gets of the photo at `index` of its sorted set: of `pairs` the one beside `X_clean.png`.

    Raises:
        ValueError: of `pairs`, there is none or more than one.
    """
    if condition != "pairs":
        return degraded_photo(clean, index, condition)
    name = path.stem.removesuffix("_clean")
    others = [other for flaw in PAIRED if (other := path.with_name(f"{name}_{flaw}.png")).exists()]
    if len(others) != 1:
        raise ValueError(f"expected one of {name}_{{{','.join(PAIRED)}}}.png beside {path}")
    return read_rgb(others[0])


def samples_of(path: Path, index: int, name: str) -> Iterator[Sample]:
    """The photo at `index` of its sorted set under every condition of it."""
    clean = read_rgb(path)
    for condition in SETS[name]:
        degraded = uploaded(path, clean, index, condition.name)
        yield Sample(path.stem.removesuffix("_clean"), condition, clean, degraded)
