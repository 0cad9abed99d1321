"""How an upload's file is built, looked at before Pillow opens it: what costs far more than its photo is refused.

Pillow's readers take every marker, chunk and offset of a file one by one, in Python: a file of nothing else would keep
a thread busy for minutes and fill the memory. Photos of cameras and editors stay far below these limits.
"""

from __future__ import annotations

import re
import struct

MOST_SCANS = 100
"""Of a progressive JPEG; photos have some ten. Each costs as much time as the photo is large and as few as 33 bytes."""

MOST_PARTS = 10_000
"""Markers of a JPEG, chunks of a PNG besides those of its pixels."""

_MOST_FILL, _MOST_EXIF, _MOST_PHOTOSHOP = 2**16, 4, 2**22
"""Of a JPEG, before its first scan: bytes between segments, Exif segments, and bytes of Photoshop's resources."""

_LEAST_IDAT = 1024
"""Bytes per chunk of a PNG's pixels on average; encoders write 4 kB and more."""

_MOST_ENTRIES, _MOST_STRIPS, _MOST_NUMBERS = 4096, 2**17, 2**18
"""Entries of a TIFF's directory, its strips or tiles, and the numbers of any entry."""

_MOST_RLE = 2**23
"""Bytes of a run-length encoded BMP, whose runs Pillow decodes in Python."""

_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
"""The markers that have parameters, and begin and end (ITU-T T.81, table B.1); the others libjpeg passes over."""

_BARE = frozenset(b"\xc8\xd8\xd9" + bytes(range(0xF0, 0xFE)))
"""Of those, which Pillow takes to have no parameters."""

_PLAIN = frozenset({1, 2, 7})
"""Types of TIFF values that are read as bytes."""

_STRIP_TAGS = frozenset({273, 279, 324, 325})
"""Offsets and byte counts of strips and tiles (TIFF 6.0)."""


def check_structure(data: bytes) -> None:
    """Look at a file of a known format; what is broken or of no known format is left to its reader.

    Raises:
        ValueError: decoding it would cost far more than a photo of its size.
    """
    for signatures, check in _CHECKS:
        if data.startswith(signatures):
            try:
                check(data)
            except (struct.error, OverflowError):  # cut short, or pointing out of the file
                return


def canvas(data: bytes) -> tuple[int, int] | None:
    """Height and width that a WebP container announces, for which its decoder makes room when it opens; else None."""
    if data[:4] != b"RIFF" or data[8:16] != b"WEBPVP8X" or len(data) < 30:
        return None
    return 1 + int.from_bytes(data[27:30], "little"), 1 + int.from_bytes(data[24:27], "little")


def _jpeg(data: bytes) -> None:
    """The first image in the file; what follows it, such as a phone's video, does not count."""
    scans, at, fill, exif, photoshop = 0, 2, 0, 0, 0
    for _ in range(MOST_PARTS):
        found = _JPEG_MARKER.search(data, at)
        if not found or (scans and found[0] == b"\xff\xd9"):
            return
        bare = not scans and found[0][1] in _BARE
        length = 0 if bare else int.from_bytes(data[found.end() : found.end() + 2])
        scans += found[0] == b"\xff\xda"
        if not scans:
            fill += found.start() - at
            exif += data.startswith(b"Exif\0\0", found.end() + 2)
            photoshop += length * data.startswith(b"Photoshop 3.0\0", found.end() + 2)
        if scans > MOST_SCANS:
            raise ValueError(f"expected a JPEG of at most {MOST_SCANS} scans")
        if exif > _MOST_EXIF:
            raise ValueError(f"expected a JPEG of at most {_MOST_EXIF} Exif segments")
        if fill > _MOST_FILL or photoshop > _MOST_PHOTOSHOP:
            raise ValueError(
                f"expected at most {_MOST_FILL} bytes of fill and {_MOST_PHOTOSHOP} of Photoshop's in a JPEG"
            )
        at = found.end() + length
    raise ValueError(f"expected a JPEG of at most {MOST_PARTS} markers")


def _png(data: bytes) -> None:
    """Up to the first frame of an animation that is not the image itself."""
    at, pixels, profiles, others = 8, 0, 0, 0
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"IEND" or (pixels and name == b"fcTL"):
            return
        pixels, profiles = pixels + (name == b"IDAT"), profiles + (name == b"iCCP")
        others += name != b"IDAT"
        if profiles > 1 or others > MOST_PARTS or pixels > MOST_PARTS + len(data) // _LEAST_IDAT:
            raise ValueError(
                f"expected a PNG of one profile and at most {MOST_PARTS} chunks besides those of its pixels"
            )
        at += 12 + length


def _tiff(data: bytes) -> None:
    order = "<" if data[:2] == b"II" else ">"
    if big := data[2] == 43:  # as Pillow tells it
        (first,) = struct.unpack_from(f"{order}Q", data, 8)
    else:
        (first,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, first)
    if count > _MOST_ENTRIES:
        raise ValueError(f"expected a TIFF directory of at most {_MOST_ENTRIES} entries, got {count}")
    entries, size = first + (8 if big else 2), 20 if big else 12
    for index in range(count):
        tag, kind, values = struct.unpack_from(f"{order}HH{'Q' if big else 'I'}", data, entries + size * index)
        if tag in _STRIP_TAGS and values > _MOST_STRIPS:
            raise ValueError(f"expected a TIFF of at most {_MOST_STRIPS} strips or tiles, got {values}")
        if kind not in _PLAIN and values > _MOST_NUMBERS:
            raise ValueError(f"expected at most {_MOST_NUMBERS} numbers in an entry of a TIFF, got {values}")


def _bmp(data: bytes) -> None:
    header, width, height = struct.unpack_from("<Iii", data, 14)
    (compression,) = struct.unpack_from("<I", data, 30)
    most = min(_MOST_RLE, 2 * (abs(width) + 2) * abs(height) + 2**16)
    if header >= 40 and compression in (1, 2) and len(data) > most:
        raise ValueError(f"expected a run-length encoded BMP of at most {most} bytes, got {len(data)}")


_CHECKS = (
    ((b"\xff\xd8",), _jpeg),
    ((b"\x89PNG\r\n\x1a\n",), _png),
    ((b"II\x2a\0", b"II\0\x2a", b"MM\0\x2a", b"MM\x2a\0", b"II\x2b\0", b"MM\0\x2b"), _tiff),
    ((b"BM",), _bmp),
)
