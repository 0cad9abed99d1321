"""What can be said of a bitstream, and of a photo beside it, in figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from service.codec.bitstream import VERSION, Bitstream
from service.imaging import read_photo
from service.store import ModelStore, StoreError


def describe(data: bytes, store: Path) -> dict[str, str | int | float]:
    """Everything that a bitstream's header says, and the name of its model where `store` has it.

    Raises:
        BitstreamError: the bytes are no bitstream, or a damaged one.
    """
    stream = Bitstream.from_bytes(data)
    try:
        names = {entry.model_id: entry.name for entry in ModelStore(store).index.models}
        unknown = "not in this store"
    except StoreError:
        names, unknown = {}, "no store to look it up in"
    found = ", ".join(f"{one.kind.label} {one.strength:.2f}" for one in stream.degradations)
    return {
        "format_version": VERSION,
        "model": names.get(stream.model_id, unknown),
        "model_id": stream.model_id.hex(),
        "rate_point": stream.rate,
        "width": stream.width,
        "height": stream.height,
        "degradations": found or "no report",
        "bytes": len(data),
        "payload_bytes": len(stream.payload),
        "outlier_bytes": len(stream.outliers),
        "bits_per_pixel": round(8 * len(data) / stream.pixels, 4),
        "checksum": "good",
    }


def compare(photo: bytes, bitstream: bytes, restored: bytes, max_pixels: int) -> dict[str, str]:
    """A photo's file, its bitstream and the photo that came back, in figures.

    Raises:
        ImageError: `photo` is none.
        ValueError: the two photos differ in size.
    """
    before, after = read_photo(photo, max_pixels), read_photo(restored, max_pixels)
    if before.shape != after.shape:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (before.shape, after.shape)]
        raise ValueError(f"expected photos of one size, got {sizes[0]} and {sizes[1]}")
    error = float(np.mean((before.astype(np.float32) - after) ** 2))
    psnr = 10 * np.log10(255**2 / error) if error else np.inf
    pixels = before.shape[0] * before.shape[1]
    return {
        "photo, bytes": f"{len(photo)}",
        "bitstream, bytes": f"{len(bitstream)} ({len(photo) / len(bitstream):.1f} times smaller)",
        "bits per pixel": f"{8 * len(photo) / pixels:.3f} -> {8 * len(bitstream) / pixels:.3f}",
        "PSNR of the restored to this photo": f"{psnr:.2f} dB",
    }
