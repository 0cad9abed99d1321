"""`python -m tests.bench.main_job --photos ../shared/data/eval/kodak`: the main job over HTTP, beside WebP.

Starts the real server and sends every photo of the folder, degraded by noise of sigma 25, rain, snow and haze, through
`/compress?rate=4` and `/decompress`. Prints and saves the PSNR against the clean photo before and after, the bits per
pixel, and what WebP makes of the same upload at the quality whose size comes nearest.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import httpx2
import numpy as np
from PIL import Image

from model_store.evaluation.conditions import Photo, degraded_photo, psnr
from service.imaging import read_photo
from tests.conftest import image_bytes
from tests.served import served

RESULT = Path(__file__).parent / "results" / "main_job.json"


@dataclass(frozen=True)
class Row:
    """One photo: PSNR in dB against the clean one, bytes of the bitstream and of the nearest WebP."""

    photo: str
    condition: str
    input_psnr: float
    psnr: float
    bytes: int
    bpp: float
    webp_quality: int
    webp_bytes: int
    webp_psnr: float


def nearest_webp(degraded: Photo, clean: Photo, size: int) -> tuple[int, int, float]:
    """Quality, bytes and PSNR of the WebP file whose size comes nearest to `size`."""
    files = {}
    low, high = 0, 100
    while low <= high:  # sizes grow with quality
        quality = (low + high) // 2
        files[quality] = image_bytes(degraded, "WEBP", quality=quality, method=4)
        if len(files[quality]) < size:
            low = quality + 1
        else:
            high = quality - 1
    quality = min(files, key=lambda q: abs(len(files[q]) - size))
    with Image.open(io.BytesIO(files[quality])) as image:
        decoded = np.asarray(image.convert("RGB"))
    return quality, len(files[quality]), psnr(decoded, clean)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.main_job", description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--rate", type=int, default=4)
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = []
    with served() as (base, _), httpx2.Client(base_url=base, timeout=120) as client:
        for index, path in enumerate(sorted(args.photos.glob("*.png"))):
            clean = read_photo(path.read_bytes(), 10**8)
            for condition in ("noise-25", "rain", "snow", "haze"):
                degraded = degraded_photo(clean, index, condition)
                upload = {"file": ("photo.png", image_bytes(degraded), "image/png")}
                sent = client.post("/compress", params={"rate": args.rate}, files=upload).raise_for_status()
                back = client.post("/decompress", content=sent.content).raise_for_status()
                restored = read_photo(back.content, 10**8)
                if restored.shape != clean.shape:
                    raise SystemExit(f"{path.name}: expected {clean.shape}, got {restored.shape}")
                size = len(sent.content)
                bpp = 8 * size / (clean.shape[0] * clean.shape[1])
                rows.append(
                    Row(
                        path.stem, condition, psnr(degraded, clean), psnr(restored, clean), size, bpp,
                        *nearest_webp(degraded, clean, size),
                    )
                )  # fmt: skip
    print(f"{'condition':10} {'input':>6} {'Limpid':>7} {'gain':>6} {'bpp':>6} {'WebP':>7} {'its bpp':>8}")
    for condition in dict.fromkeys(row.condition for row in rows):
        chosen = [row for row in rows if row.condition == condition]
        before, after = mean(row.input_psnr for row in chosen), mean(row.psnr for row in chosen)
        webp_bpp = mean(row.bpp * row.webp_bytes / row.bytes for row in chosen)
        print(
            f"{condition:10} {before:6.2f} {after:7.2f} {after - before:+6.2f} {mean(row.bpp for row in chosen):6.3f}"
            f" {mean(row.webp_psnr for row in chosen):7.2f} {webp_bpp:8.3f}"
        )
    args.json.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    args.json.write_text(f'{{"rate": {args.rate}, "photos": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
