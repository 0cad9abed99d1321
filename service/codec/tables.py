"""Integer tables of the entropy coder: the scales of y and the cumulative frequencies of y and z.

They are computed once, at export, and shipped in the store; nothing here runs when a bitstream is read.
A table is a row of cumulative frequencies over 2^16, for the symbols offset, offset + 1, ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SCALE_LEVELS = 64
SCALE_MIN = 0.11
SCALE_STEP = 0.123  # nats between levels: 0.11 to 255, the range of CompressAI's scale table
Z_LIMIT = 63
PRECISION = 16


def scale_to_level(scale: Tensor) -> Tensor:
    """The (fractional) level of a deviation, not clamped."""
    return (scale / SCALE_MIN).log() / SCALE_STEP


def level_to_scale(level: Tensor) -> Tensor:
    """The deviation, in units of the latents, of a level in [0, 63]."""
    return SCALE_MIN * torch.exp(level * SCALE_STEP)


@dataclass(frozen=True)
class CdfTables:
    """A set of tables.

    Attributes:
        cdf: (T, L) int32, cumulative frequencies from 0 to 2^16; a row repeats 2^16 after its end.
        size: (T,) int32, entries in use per row, one more than its symbols.
        offset: (T,) int32, the symbol of the first frequency.

    Raises:
        ValueError: that is not what was given. The coder trusts its tables, and a wrong one would end the process.
    """

    cdf: NDArray[np.int32]
    size: NDArray[np.int32]
    offset: NDArray[np.int32]

    def __post_init__(self) -> None:
        rows, most = self.cdf.shape
        arrays = (self.cdf, self.size, self.offset)
        if any(array.dtype != np.int32 for array in arrays) or not self.size.shape == self.offset.shape == (rows,):
            raise ValueError("expected int32 tables with a size and an offset per row")
        if ((self.size < 3) | (self.size > most)).any():
            raise ValueError(
                f"expected 3 to {most} entries in use per table, got {self.size.min()} to {self.size.max()}"
            )
        used = np.arange(1, most) < self.size[:, None]
        ends = self.cdf[np.arange(rows), self.size - 1]
        rises = np.diff(self.cdf.astype(np.int64), axis=1) > 0
        if self.cdf[:, 0].any() or not rises[used].all() or (ends != 1 << PRECISION).any():
            raise ValueError(f"expected frequencies that rise from 0 to {1 << PRECISION} in every table")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> CdfTables:
        """What `to_tensors` made of them, among the tensors of a model."""
        return cls(*(tensors[f"tables.{name}.{key}"].numpy() for key in ("cdf", "size", "offset")))

    def to_tensors(self, name: str) -> dict[str, Tensor]:
        """As a model holds them: `tables.NAME.cdf`, `.size` and `.offset`."""
        return {f"tables.{name}.{key}": torch.from_numpy(array) for key, array in vars(self).items()}

    def within(self, limit: int) -> bool:
        """Whether all symbols lie in +-limit."""
        offset = self.offset.astype(np.int64)
        return bool((offset >= -limit).all() and (offset + self.size - 2 <= limit).all())

    @classmethod
    def from_masses(cls, masses: list[NDArray[np.float64]], offsets: list[int]) -> CdfTables:
        """Quantise probability masses to frequencies of at least 1 that sum to 2^16."""
        rows = [np.concatenate([[0], np.cumsum(_quantise(mass))]) for mass in masses]
        cdf = np.full((len(rows), max(map(len, rows))), 1 << PRECISION, dtype=np.int32)
        for row, target in zip(rows, cdf):
            target[: len(row)] = row
        return cls(cdf, np.array([len(row) for row in rows], np.int32), np.array(offsets, np.int32))


def _quantise(mass: NDArray[np.float64]) -> NDArray[np.int64]:
    """Frequencies of at least 1 that sum to 2^16; the rounding error goes to the largest."""
    total = 1 << PRECISION
    frequency = np.maximum(1, np.floor(mass / mass.sum() * (total - len(mass)) + 0.5).astype(np.int64))
    frequency[frequency.argmax()] += total - frequency.sum()
    return frequency


def gaussian_tables() -> CdfTables:
    """A table per scale level: a zero-mean Gaussian on the integers, out to five deviations and a little more."""
    masses, offsets = [], []
    for level in range(SCALE_LEVELS):
        scale = SCALE_MIN * math.exp(level * SCALE_STEP)
        reach = math.ceil(5 * scale) + 2
        edges = np.array([math.erf((k - 0.5) / scale / math.sqrt(2)) / 2 for k in range(-reach, reach + 2)])
        masses.append(np.diff(edges))
        offsets.append(-reach)
    return CdfTables.from_masses(masses, offsets)


def logistic_tables(location: NDArray[np.float64], scale: NDArray[np.float64]) -> CdfTables:
    """A table per (location, scale) pair: a logistic distribution on the integers within +-63."""
    edges = np.arange(-Z_LIMIT, Z_LIMIT + 2) - 0.5
    edges[0], edges[-1] = -np.inf, np.inf
    masses = []
    for mean, width in zip(location, scale):
        with np.errstate(over="ignore"):
            masses.append(np.diff(1 / (1 + np.exp(-(edges - mean) / width))))
    return CdfTables.from_masses(masses, [-Z_LIMIT] * len(masses))
