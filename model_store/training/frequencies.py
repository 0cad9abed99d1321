"""How often a shipped model really sends each symbol: what its tables can follow more closely than a Gaussian does.

Training shapes the latents only roughly into the Gaussians that the rate is estimated with. The scale levels stay what
they are, and with them the exact path; only the table that belongs to each is drawn from counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_store.training.batches import Batch, Batches
from model_store.training.photos import PhotoPool
from service.codec.shipped import ShippedCodec
from service.codec.tables import CdfTables, gaussian_tables

COUNTED_BATCHES = 120

_BELIEF = 2000.0  # symbols' worth of trust in the Gaussian: levels that are seldom used keep it


def with_counted_tables(
    tensors: dict[str, Tensor], description: str, photos: Path, batches: int = COUNTED_BATCHES, crop: int = 224
) -> dict[str, Tensor]:
    """The tensors of a shipped model (`ship`) with other tables of y, symmetric and of the reach of `gaussian_tables`.

    Args:
        photos: a folder of photographs; they are degraded as in training, at random rate points.
        batches: how many batches of four crops to count.
    """
    codec = ShippedCodec.from_tensors(tensors, description, torch.device("cpu"))
    tables = _counted(
        codec, iter(Batches(PhotoPool(photos, crop, codec.device), 4, crop, codec.device, seed=3)), batches
    )
    return tensors | {f"tables.y.{key}": torch.from_numpy(getattr(tables, key)) for key in ("cdf", "size", "offset")}


def _counted(codec: ShippedCodec, data: Iterator[Batch], batches: int) -> CdfTables:
    tables = gaussian_tables()
    counts = [np.zeros(size - 1) for size in tables.size]
    for batch in islice(data, batches):
        y, z_hat, _ = codec.analyse(batch.degraded, batch.rate)
        for latents in codec.rounded(y, z_hat, batch.rate)[0]:
            for symbols, levels in latents.passes:
                _count(counts, codec.y_tables.clip(symbols, levels) - tables.offset[levels], levels)
    masses = []
    for row, size, seen in zip(tables.cdf, tables.size, counts):
        gaussian = np.diff(row[:size]) / row[size - 1]
        mass = _BELIEF * gaussian + (seen + seen[::-1]) / 2
        masses.append(mass / mass.sum())
    return CdfTables.from_masses(masses, tables.offset.tolist())


def _count(counts: list[NDArray[np.float64]], places: NDArray[np.int32], levels: NDArray[np.int32]) -> None:
    """Add one symbol each: `places` from the start of the row of its level."""
    order = np.argsort(levels, kind="stable")
    present, starts = np.unique(levels[order], return_index=True)
    for level, group in zip(present, np.split(places[order], starts[1:])):
        counts[level] += np.bincount(group, minlength=len(counts[level]))
