"""What is measured with: one of the store's models, and the peers JPEG, WebP and AVIF. All give real file bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model_store.evaluation.conditions import ALL_RATES, Sample
from model_store.images import Photo, as_photo, as_tensor
from model_store.index import read_model
from service.codec.bitstream import MODEL_ID_BYTES, Bitstream
from service.codec.device import pick_device, transform_precision
from service.codec.shipped import Effort, ShippedCodec, latent_size, pad_to_stride

PEERS: dict[str, tuple[int, ...]] = {
    "JPEG": (5, 10, 25, 50, 75, 90),
    "WEBP": (0, 1, 2, 5, 15, 40, 65, 85),
    "AVIF": (5, 12, 20, 30, 40, 60, 80),
}
"""Qualities. Of noisy photos PSNR has its peak at a low one and falls beyond: they lie dense enough to meet it."""

_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"optimize": True},
    "WEBP": {"method": 4},
    "AVIF": {"speed": 6, "subsampling": "4:2:0", "max_threads": 1},
}
"""Pillow's defaults, which gateways will use, but for JPEG's optimised Huffman tables and one thread."""


class LimpidCodec:
    """A model of the store, run as the service runs it: same precision, same container, one photo at a time."""

    def __init__(self, store: Path, name: str | None = None) -> None:
        model, self.device = read_model(store, name), pick_device("auto")
        self.entry = model.entry
        dtype = getattr(torch, transform_precision(self.device))
        self.codec = ShippedCodec.from_tensors(model.tensors, model.description, self.device, dtype)

    def round_trip(self, photo: Photo, rates: Sequence[int], rounds: int = 0) -> Iterator[tuple[Bitstream, Photo]]:
        """Compress and restore a photo at some rate points, with so many rounds of refinement, 0 to 8."""
        height, width = photo.shape[:2]
        x = pad_to_stride(as_tensor(photo).to(self.device))
        size = latent_size(height, width)
        model_id = bytes.fromhex(self.entry["sha256"])[:MODEL_ID_BYTES]
        for point in rates:
            rate = torch.tensor([point - 1], device=self.device)
            y, z_hat, found = self.codec.analyse(x, rate)
            effort = Effort(rounds, x, found) if rounds else None
            coded = self.codec.write(self.codec.symbols_of(y, z_hat, rate, effort)[0])
            y_hat = self.codec.read([coded], rate, *size)
            x_hat = self.codec.synthesise(y_hat, rate)
            stream = Bitstream(model_id, point, width, height, found[0], coded.outliers, coded.payload)
            yield stream, as_photo(x_hat[0, :, :height, :width])

    def points(
        self, sample: Sample, rates: Sequence[int] = ALL_RATES, rounds: int = 0
    ) -> Iterator[tuple[int, int, Photo]]:
        """(rate point, bytes of the `.lmp` file, restored photo) for those rate points that its condition has."""
        chosen = [rate for rate in sample.condition.rates if rate in rates]
        for stream, restored in self.round_trip(sample.degraded, chosen, rounds):
            yield stream.rate, len(stream.to_bytes()), restored


def peer_points(format: str, photo: Photo) -> Iterator[tuple[int, int, Photo]]:
    """(quality, bytes, decoded photo) of a peer, chroma at half resolution."""
    for quality in PEERS[format]:
        buffer = io.BytesIO()
        Image.fromarray(photo).save(buffer, format, quality=quality, **_OPTIONS[format])
        with Image.open(buffer) as image:
            yield quality, len(buffer.getvalue()), np.asarray(image.convert("RGB"))


def denoised(photo: Photo, strength: float) -> Photo:
    """OpenCV's non-local means for colour photos, its windows as by default; strength is `h` for both."""
    import cv2

    blue_first = np.ascontiguousarray(photo[..., ::-1])  # as OpenCV has it, which takes the lightness from it
    return np.asarray(cv2.fastNlMeansDenoisingColored(blue_first, None, strength, strength, 7, 21)[..., ::-1], np.uint8)
