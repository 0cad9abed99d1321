"""`python -m docs.picture`: draws `before-after.png` of the README: an upload, Limpid, and WebP at that size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model_store.images import psnr
from service.codec.bitstream import Bitstream
from service.engine import EncodeJob, Engine, Photo
from service.imaging import read_photo
from service.settings import Settings
from service.store import ModelStore
from tests.conftest import image_bytes, noisy, photo

OUTPUT = Path(__file__).with_name("before-after.png")
RATE, BAR = 4, 30


def webp_of_size(pixels: Photo, size: int) -> tuple[Photo, int]:
    """The best WebP file of at most `size` bytes, or the smallest there is, decoded; and its bytes."""
    files = [image_bytes(pixels, "WEBP", quality=quality, method=6) for quality in range(101)]
    data = max((file for file in files if len(file) <= size), key=len, default=min(files, key=len))
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")), len(data)


def main() -> None:
    settings = Settings()
    engine = Engine(ModelStore(settings.store), settings.device, settings.precision)
    clean = photo("parrots")
    uploaded = image_bytes(noisy(clean, 25), "JPEG", quality=90)
    upload = read_photo(uploaded, settings.max_pixels)
    data = engine.encode([EncodeJob(upload, RATE)])[0].to_bytes()
    (restored,) = engine.decode([Bitstream.from_bytes(data)])
    webp, webp_bytes = webp_of_size(upload, len(data))
    panels = [
        (upload, f"camera: JPEG, {len(uploaded):,} bytes, {psnr(upload, clean):.1f} dB"),
        (restored, f"Limpid: {len(data):,} bytes, {psnr(restored, clean):.1f} dB"),
        (webp, f"WebP: {webp_bytes:,} bytes, {psnr(webp, clean):.1f} dB"),
    ]
    height, width = clean.shape[:2]
    sheet = Image.new("RGB", (3 * width + 16, height + BAR), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for index, (pixels, caption) in enumerate(panels):
        left = index * (width + 8)
        sheet.paste(Image.fromarray(pixels), (left, BAR))
        draw.text((left + 2, 7), caption, "black", font)
    sheet.save(OUTPUT, optimize=True)


if __name__ == "__main__":
    main()
