"""How often a shipped model really sends each symbol: what its tables can follow more closely than a Gaussian does.

Training shapes the latents only roughly into the Gaussians that the rate is estimated with. The scale levels stay what
they are, and with them the exact path; only the table that belongs to each is drawn from counts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model_store.training.loop import Batches
from model_store.training.photos import PhotoPool
from service.codec.shipped import ShippedCodec
from service.codec.tables import CdfTables, gaussian_tables

_BELIEF = 2000.0  # symbols' worth of trust in the Gaussian: levels that are seldom used keep it


def fitted_tables(codec: ShippedCodec, photos: Path, batches: int, crop: int = 224, seed: int = 3) -> CdfTables:
    """Tables of y, one per scale level, symmetric and of the same reach as `gaussian_tables`.

    Args:
        codec: the model on the CPU, with tables of that reach.
        photos: a folder of photographs; they are degraded as in training, at random rate points.
        batches: how many batches of four crops to count.
    """
    data = iter(Batches(PhotoPool(photos, crop, codec.device), 4, crop, codec.device, seed))
    tables = gaussian_tables()
    counts = [np.zeros(size - 1) for size in tables.size]
    for _ in range(batches):
        batch = next(data)
        y, z_hat, _ = codec.analyse(batch.degraded, batch.rate)
        for latents in codec.symbols_of(y, z_hat, batch.rate):
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
