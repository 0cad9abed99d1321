"""How often a shipped model really sends each symbol: what its tables can follow more closely than a Gaussian does.

Training shapes the latents only roughly into the Gaussians that the rate is estimated with, and z into logistics. The
scale levels stay what they are, and with them the exact path; only the table that belongs to each is drawn from counts.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model_store.training.batches import Batches
from model_store.training.photos import PhotoPool
from service.codec.rans import GuardedTables, Symbols
from service.codec.shipped import ShippedCodec
from service.codec.tables import CdfTables, gaussian_tables

COUNTED_BATCHES = 120

_BELIEF_Y, _BELIEF_Z = 2000.0, 100.0
"""Symbols' worth of trust in what training estimates with: levels that are seldom used keep it."""


def with_counted_tables(
    tensors: dict[str, Tensor], description: str, photos: Path, batches: int = COUNTED_BATCHES, crop: int = 224
) -> dict[str, Tensor]:
    """The tensors of a shipped model (`ship`) with other tables: those of y symmetric, all of the reach that they had.

    Args:
        photos: a folder of photographs; they are degraded as in training, at random rate points.
        batches: how many batches of four crops to count.
    """
    codec = ShippedCodec.from_tensors(tensors, description, torch.device("cpu"))
    data = iter(Batches(PhotoPool(photos, crop, codec.device), 4, crop, codec.device, seed=3))
    y = _Counted(gaussian_tables())
    z = _Counted(CdfTables.from_tensors(tensors, "z"))
    for batch in islice(data, batches):
        latents, z_hat, _ = codec.analyse(batch.degraded, batch.rate)
        for one in codec.rounded(latents, z_hat, batch.rate)[0]:
            z.add(one.z, one.rate * codec.config.hyper + codec.z_channels(len(one.z)))
            for symbols, levels in one.passes:
                y.add(symbols, levels)
    return tensors | y.tables(_BELIEF_Y, symmetric=True).to_tensors("y") | z.tables(_BELIEF_Z).to_tensors("z")


class _Counted:
    """How often each symbol of each of some tables was sent."""

    def __init__(self, estimated: CdfTables) -> None:
        self._estimated = GuardedTables(estimated)
        self._counts = [np.zeros(size - 1) for size in estimated.size]

    def add(self, symbols: Symbols, rows: Symbols) -> None:
        """Count symbols (n,) with their table rows (n,)."""
        places = self._estimated.clip(symbols, rows) - self._estimated.tables.offset[rows]
        order = np.argsort(rows, kind="stable")
        present, starts = np.unique(rows[order], return_index=True)
        for row, group in zip(present, np.split(places[order], starts[1:])):
            self._counts[row] += np.bincount(group, minlength=len(self._counts[row]))

    def tables(self, belief: float, symmetric: bool = False) -> CdfTables:
        """Tables that follow the counts, as far as these outweigh so many symbols of what was estimated."""
        estimated, masses = self._estimated.tables, []
        for row, size, seen in zip(estimated.cdf, estimated.size, self._counts):
            mass = belief * np.diff(row[:size]) / row[size - 1] + ((seen + seen[::-1]) / 2 if symmetric else seen)
            masses.append(mass / mass.sum())
        return CdfTables.from_masses(masses, estimated.offset.tolist())
