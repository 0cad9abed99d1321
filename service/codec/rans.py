"""Entropy coding: a guarded door to `compressai.ans`, which itself checks nothing.

What the guard does, and against what (version 1.2.8):
- every table ends with a sentinel of zero width, so that the decoder can never take the escape branch;
- symbols are clipped into their table and the rare rest travels beside the stream (`Outliers`);
- received bytes are followed by as many zeros as the decoder could ever read: a 32-bit word per symbol and its state;
- fewer than 4 symbols are never coded alone: the stream always begins with z, which has more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from service.codec.tables import PRECISION, CdfTables

if TYPE_CHECKING:
    from compressai.ans import BufferedRansEncoder

Symbols = NDArray[np.int32]

SYMBOL_LIMIT = 2**15 - 1
"""Latents are clipped to +-this many steps around their mean."""

FEWEST_SYMBOLS = 4

_AT_ONCE = 2**18
"""Symbols per call of the coder, which holds Python's lock: nothing else of the service moves then. (`flush` writes all
that was added in one call, 15 ms per million symbols; it offers no other way.)"""

_WORD = 4
"""Bytes that the decoder reads at most per symbol; its state takes four such words."""

_MOST_BYTES = 5
"""Of one number in a list of outliers."""


class CorruptPayload(ValueError):
    """The entropy-coded bytes cannot have come from this codec."""


@cache
def _ans() -> ModuleType:
    """The extension module alone: the package around it imports torchvision and all its models, three seconds' worth.

    Raises:
        ModuleNotFoundError: compressai is not installed.
    """
    name = "compressai.ans"
    if name not in sys.modules:
        package = find_spec("compressai")
        spec = PathFinder.find_spec(name, package.submodule_search_locations) if package else None
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"expected {name}, the entropy coder; is compressai installed?", name=name)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


@dataclass(frozen=True)
class GuardedTables:
    """`CdfTables` as lists with the sentinel appended, the form that the coder takes."""

    tables: CdfTables

    @cached_property
    def rows(self) -> list[list[int]]:
        return [[*row[:size].tolist(), 1 << PRECISION] for row, size in zip(self.tables.cdf, self.tables.size)]

    @cached_property
    def sizes(self) -> list[int]:
        return (self.tables.size + 1).tolist()

    @cached_property
    def offsets(self) -> list[int]:
        return self.tables.offset.tolist()

    def clip(self, symbols: Symbols, indexes: Symbols) -> Symbols:
        """The nearest symbols that each one's table holds."""
        low = self.tables.offset[indexes]
        return np.clip(symbols, low, low + self.tables.size[indexes] - 2)


class Encoder:
    """Collects groups of symbols and writes them as one stream."""

    def __init__(self) -> None:
        self._encoder: BufferedRansEncoder = _ans().BufferedRansEncoder()
        self._count = 0

    def add(self, symbols: Symbols, indexes: Symbols, tables: GuardedTables) -> None:
        """Append symbols (n,) with their table rows (n,).

        Raises:
            ValueError: a symbol lies outside its table, or the first group is too short for the coder.
        """
        if self._count == 0 and len(symbols) < FEWEST_SYMBOLS:
            raise ValueError(f"expected at least {FEWEST_SYMBOLS} symbols in the first group, got {len(symbols)}")
        if not np.array_equal(tables.clip(symbols, indexes), symbols):
            raise ValueError("expected every symbol inside its table")
        for start in range(0, len(symbols), _AT_ONCE):
            some, rows = symbols[start : start + _AT_ONCE].tolist(), indexes[start : start + _AT_ONCE].tolist()
            self._encoder.encode_with_indexes(some, rows, tables.rows, tables.sizes, tables.offsets)
        self._count += len(symbols)

    def finish(self) -> bytes:
        return self._encoder.flush()


class Decoder:
    """Reads groups of symbols from a stream, in the order in which they were added.

    Args:
        payload: received bytes, of any content.
        most: an upper bound of the symbols that will be read.

    Raises:
        CorruptPayload: so many symbols never take so many bytes.
    """

    def __init__(self, payload: bytes, most: int) -> None:
        room = _WORD * (most + 4)
        if len(payload) > room:
            raise CorruptPayload(f"{len(payload)} bytes for {most} symbols, which take {room} at most")
        self._left = most
        self._decoder = _ans().RansDecoder()
        self._decoder.set_stream(payload + bytes(-len(payload) % _WORD + room))

    def take(self, indexes: Symbols, tables: GuardedTables) -> Symbols:
        """The next len(indexes) symbols; whatever the bytes are, each lies inside its table.

        Raises:
            ValueError: more symbols were asked for than announced.
        """
        self._left -= len(indexes)
        if self._left < 0:
            raise ValueError("expected no more symbols than announced")
        symbols = np.zeros(len(indexes), np.int32)
        for start in range(0, len(indexes), _AT_ONCE):
            rows = indexes[start : start + _AT_ONCE].tolist()
            symbols[start : start + len(rows)] = self._decoder.decode_stream(
                rows, tables.rows, tables.sizes, tables.offsets
            )
        return symbols


def _numbers(data: bytes, most: int) -> Symbols:
    """LEB128 numbers below 2^31, read 2^18 bytes at a time: the arrays beside take twenty times as much.

    Raises:
        CorruptPayload: they are more than so many, or not of this kind.
    """
    found, count, at = [np.zeros(0, np.int32)], 0, 0
    while at < len(data):
        seen = np.frombuffer(data, np.uint8, min(_AT_ONCE, len(data) - at), at)
        last = np.flatnonzero(seen < 0x80)
        first = np.concatenate([[0], last[:-1] + 1])
        if not len(last) or (last - first >= _MOST_BYTES).any():
            raise CorruptPayload(f"outliers: a number of more than {_MOST_BYTES} bytes, or one cut short")
        values = np.zeros(len(last), np.int64)
        for place in range(int((last - first).max()) + 1):
            has = first + place <= last
            values[has] |= (seen[first[has] + place].astype(np.int64) & 0x7F) << 7 * place
        count += len(values)
        if count > most or int(values.max()) > np.iinfo(np.int32).max:
            raise CorruptPayload(f"outliers: more than {most} numbers, or one too large")
        found.append(values.astype(np.int32))
        at += int(last[-1]) + 1
    return np.concatenate(found)


def leb128(numbers: Iterable[int]) -> bytes:
    """Numbers from 0 on, seven bits a byte, the lowest first, as `_numbers` reads them."""
    out = bytearray()
    for value in numbers:
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


@dataclass(frozen=True)
class Outliers:
    """Symbols that did not fit their table: `position` (n,) in coding order, `excess` (n,) beyond the clipped value.

    Bytes: n, then per outlier the distance from the position before (from -1) and the zigzag excess, all LEB128.
    """

    position: Symbols
    excess: Symbols

    @classmethod
    def between(cls, symbols: Symbols, clipped: Symbols) -> Outliers:
        position = np.flatnonzero(symbols != clipped).astype(np.int32)
        return cls(position, symbols[position] - clipped[position])

    def to_bytes(self) -> bytes:
        if not len(self.position):
            return b""
        steps = np.diff(self.position, prepend=-1)
        zigzag = np.where(self.excess < 0, -2 * self.excess - 1, 2 * self.excess)
        return leb128([len(self.position), *np.stack([steps, zigzag], 1).reshape(-1).tolist()])

    @classmethod
    def from_bytes(cls, data: bytes, latents: int) -> Outliers:
        """Raises:
        CorruptPayload: the bytes are not a list of outliers of a photo with so many latents.
        """
        numbers = _numbers(data, 2 * latents + 1)
        if len(numbers) and len(numbers) != 2 * int(numbers[0]) + 1:
            raise CorruptPayload("outliers: the list does not end where it should")
        steps, zigzag = numbers[1::2], numbers[2::2]
        if (steps < 1).any() or (zigzag < 1).any() or (zigzag > 4 * SYMBOL_LIMIT).any():
            raise CorruptPayload("outliers: a step or an excess out of range")
        if int(steps.sum(dtype=np.int64)) > latents:
            raise CorruptPayload(f"outliers: one beyond the {latents} latents")
        return cls(np.cumsum(steps, dtype=np.int32) - 1, np.where(zigzag % 2, -(zigzag + 1) // 2, zigzag // 2))

    def within(self, start: int, count: int) -> Outliers:
        """Those at positions start to start + count, relative to start."""
        chosen = (self.position >= start) & (self.position < start + count)
        return Outliers(self.position[chosen] - start, self.excess[chosen])

    def apply(self, symbols: Symbols) -> Symbols:
        """Add the excesses, in place. Raises CorruptPayload where a symbol leaves the limits."""
        if len(self.position):
            symbols[self.position] += self.excess
            if np.abs(symbols[self.position]).max() > SYMBOL_LIMIT:
                raise CorruptPayload(f"outliers: a symbol beyond +-{SYMBOL_LIMIT}")
        return symbols
