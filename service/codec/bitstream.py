"""The `.lmp` container (media type `application/vnd.limpid`), version 1. All numbers are little-endian.

    offset  bytes  field
    0       4      magic: 89 4C 4D 50 ("\\x89LMP"; the first byte is no text in any common encoding)
    4       1      format version: 1
    5       1      rate point: 1 to 8
    6       8      model id: the first 8 bytes of the SHA-256 of the model's file
    14      4      width in pixels, at least 1
    18      4      height in pixels, at least 1
    22      1      n, entries of the degradation report: 0 to 16
    23      2n     per entry the kind (1 byte, see `DegradationKind`) and its strength in 1/255 (1 byte)
    23+2n   4      o, bytes of outliers
    27+2n   4      p, bytes of the entropy-coded payload
    31+2n   o      outliers, see `rans.Outliers`
    ...     p      payload: one rANS stream of z, then y pass by pass (`prior.parts`), each in (channel, row, column)
                   order, without the latents whose scale level is at most the model's `CodecConfig.skipped`
    ...     4      CRC-32C (RFC 3720, Castagnoli) of everything before it

A reader looks at magic, version, length and checksum before anything else, and never allocates by a number it read
before checking it. The checksum guards against accidents, not against forgers: whatever passes it must still decode
without harm, to some picture.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import google_crc32c

from service.codec.config import RATE_POINTS

MAGIC = b"\x89LMP"
VERSION = 1
MEDIA_TYPE = "application/vnd.limpid"
MODEL_ID_BYTES = 8
MAX_DEGRADATIONS = 16

_HEAD = struct.Struct("<4sBB8sIIB")
_LENGTHS = struct.Struct("<II")
_CRC = struct.Struct("<I")


class BitstreamError(ValueError):
    """The bytes are not a bitstream that this reader can decode."""


class NotABitstream(BitstreamError):
    """The bytes do not begin like a `.lmp` file."""


class UnsupportedVersion(BitstreamError):
    """The stream is of a format version that this reader does not know."""


class CorruptBitstream(BitstreamError):
    """The stream is cut short, altered, or contradicts itself."""


class DegradationKind(IntEnum):
    """What the encoder may say was wrong with the photo."""

    CLEAN = 0
    NOISE = 1
    RAIN = 2
    SNOW = 3
    HAZE = 4
    LOW_LIGHT = 5
    BLUR = 6
    JPEG = 7

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


_KNOWN = frozenset(DegradationKind)
"""Others are of a later report, which changes no pixel: a reader passes over them."""


@dataclass(frozen=True)
class Degradation:
    """One finding of the encoder: a kind and how strong it is, in [0, 1].

    The strength of a flaw is the harm that it alone does: 0 at a PSNR of 40 dB and more, 1 at 10 dB and less, linear
    between. That of `CLEAN` is 1 less the probability of the likeliest flaw.
    """

    kind: DegradationKind
    strength: float


@dataclass(frozen=True)
class Bitstream:
    """The content of one `.lmp` file.

    Attributes:
        model_id: 8 bytes, which model wrote it.
        rate: rate point, 1 to 8.
        width, height: of the photo, in pixels, before padding.
        degradations: what the encoder found, strongest first; empty where the model has no opinion.
        outliers, payload: the coded latents, see `rans`.
    """

    model_id: bytes
    rate: int
    width: int
    height: int
    degradations: tuple[Degradation, ...]
    outliers: bytes
    payload: bytes

    @property
    def pixels(self) -> int:
        return self.width * self.height

    def to_bytes(self) -> bytes:
        """Raises:
        ValueError: a field is out of the range that the format allows.
        """
        if (
            not 1 <= self.rate <= RATE_POINTS
            or min(self.width, self.height) < 1
            or len(self.model_id) != MODEL_ID_BYTES
        ):
            raise ValueError(
                f"expected rate 1 to {RATE_POINTS}, a size of at least 1x1 and an 8-byte model id, got {self}"
            )
        if len(self.degradations) > MAX_DEGRADATIONS:
            raise ValueError(f"expected at most {MAX_DEGRADATIONS} degradations, got {len(self.degradations)}")
        report = b"".join(bytes([d.kind, round(d.strength * 255)]) for d in self.degradations)
        body = (
            _HEAD.pack(MAGIC, VERSION, self.rate, self.model_id, self.width, self.height, len(self.degradations))
            + report
            + _LENGTHS.pack(len(self.outliers), len(self.payload))
            + self.outliers
            + self.payload
        )
        return body + _CRC.pack(google_crc32c.value(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> Bitstream:
        """Parse and check one stream.

        Raises:
            NotABitstream: no magic.
            UnsupportedVersion: magic, but another version.
            CorruptBitstream: cut short, longer than it says, a wrong checksum, or a field out of range.
        """
        if data[: len(MAGIC)] != MAGIC:
            raise NotABitstream("expected a Limpid bitstream, which begins with the bytes 89 4C 4D 50")
        if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
            raise UnsupportedVersion(f"expected format version {VERSION}, got {data[len(MAGIC)]}")
        least = _HEAD.size + _LENGTHS.size + _CRC.size
        if len(data) < least:
            raise CorruptBitstream(f"expected at least {least} bytes, got {len(data)}: the stream is cut short")
        body, (stated,) = data[: -_CRC.size], _CRC.unpack(data[-_CRC.size :])
        actual = google_crc32c.value(body)
        if actual != stated:
            raise CorruptBitstream(f"checksum is {actual:08x} but the stream says {stated:08x}: it was cut or altered")
        _, _, rate, model_id, width, height, entries = _HEAD.unpack_from(body)
        if not 1 <= rate <= RATE_POINTS:
            raise CorruptBitstream(f"expected a rate point from 1 to {RATE_POINTS}, got {rate}")
        if min(width, height) < 1:
            raise CorruptBitstream(f"expected a size of at least 1x1, got {width}x{height}")
        if entries > MAX_DEGRADATIONS:
            raise CorruptBitstream(f"expected at most {MAX_DEGRADATIONS} degradations, got {entries}")
        start = _HEAD.size + 2 * entries
        if start + _LENGTHS.size > len(body):
            raise CorruptBitstream("the degradation report runs past the end of the stream")
        outliers, payload = _LENGTHS.unpack_from(body, start)
        first = start + _LENGTHS.size
        if first + outliers + payload != len(body):
            raise CorruptBitstream(
                f"the stream states {outliers} + {payload} bytes of content but holds {len(body) - first}"
            )
        told = ((body[at], body[at + 1] / 255) for at in range(_HEAD.size, start, 2))
        report = tuple(Degradation(DegradationKind(kind), strength) for kind, strength in told if kind in _KNOWN)
        middle = first + outliers
        return cls(model_id, rate, width, height, report, body[first:middle], body[middle:])
