"""`python -m model_store.training.validation`: weights of a run on photos of the evaluation, in minutes, not hours.

Rates are estimated and most photos are cut to their centres, so the figures serve to compare weights with each other;
what a model is worth is told by `model_store.evaluation`, after its export. Haze and low light are judged by the whole
photo, whose brightness a centre does not tell: there the order of two models was the other way round.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model_store.evaluation.conditions import EVEN_RATES, clean_paths, uploaded
from model_store.evaluation.rate_distortion import Curve, bd_rate
from model_store.images import Photo, as_photo, as_tensor, psnr, read_rgb
from model_store.training.weights import weights_to_start_from
from service.codec.config import CONFIGS, STRIDE
from service.codec.device import pick_device, transform_precision
from service.codec.model import TrainableCodec

CROP = (384, 512)
"""Rows and columns of the centre that is seen."""


@dataclass(frozen=True)
class Case:
    """A condition of a set, every `every`-th photo of it, its centre or all of it, at some rate points."""

    set: str
    condition: str
    every: int
    rates: tuple[int, ...]
    whole: bool = False

    @property
    def name(self) -> str:
        return f"{self.set} {self.condition}{', whole' if self.whole else ''}"


_TWO = (5, 7)

CASES = (
    Case("kodak", "clean", 1, EVEN_RATES),
    Case("kodak", "noise-25", 3, EVEN_RATES),
    Case("kodak", "sensor-3", 3, EVEN_RATES),
    Case("kodak", "rain", 1, EVEN_RATES),
    Case("kodak", "snow", 3, EVEN_RATES),
    Case("kodak", "haze", 1, EVEN_RATES, whole=True),
    Case("kodak", "low-light", 1, EVEN_RATES, whole=True),
    Case("rain", "pairs", 1, _TWO),
    Case("cc15", "pairs", 1, _TWO),
)


def _centre(photo: Photo, most: tuple[int, ...]) -> Photo:
    """Of at most so many rows and columns, in multiples of the stride."""
    height, width = (min(side, wanted) // STRIDE * STRIDE for side, wanted in zip(photo.shape, most))
    top, left = (photo.shape[0] - height) // 2, (photo.shape[1] - width) // 2
    return photo[top : top + height, left : left + width]


def photos_of(root: Path, case: Case) -> Iterator[tuple[Photo, Photo]]:
    """Degraded and clean photos, or their centres."""
    for index, path in list(enumerate(clean_paths(root, case.set)))[:: case.every]:
        clean = read_rgb(path)
        most = clean.shape[:2] if case.whole else CROP
        yield _centre(uploaded(path, clean, index, case.condition), most), _centre(clean, most)


@torch.inference_mode()
def validate(model: TrainableCodec, root: Path) -> dict[str, Curve]:
    """A case's name to the means over its photos: estimated bits per pixel, and PSNR of 8-bit RGB in dB."""
    device = next(model.parameters()).device
    bf16 = transform_precision(device) == "bfloat16"
    model.eval().to(memory_format=torch.channels_last)
    found = {}
    for case in tqdm(CASES, desc="validation"):
        points: dict[int, list[tuple[float, float]]] = {rate: [] for rate in case.rates}
        for degraded, clean in photos_of(root, case):
            x = as_tensor(degraded).to(device)
            for point, seen in points.items():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    out = model(x, torch.tensor([point - 1], device=device))
                bits = float(out.y_bits + out.z_bits)
                seen.append((bits / (x.shape[2] * x.shape[3]), psnr(as_photo(out.x_hat[0].float().clamp(0, 1)), clean)))
        means = [np.mean(seen, axis=0).tolist() for seen in points.values()]
        bpp, quality = zip(*means)
        found[case.name] = Curve(bpp, quality, case.rates)
    return found


def gains(curve: Curve, anchor: Curve) -> list[float]:
    """dB by which `curve` is above each point of `anchor` at its bits."""
    return [curve.psnr_at(bpp) - psnr for bpp, psnr in zip(anchor.bpp, anchor.psnr)]


def compared(curve: Curve, anchor: Curve) -> str:
    """Gains at the bits of the other and BD-rate, where they can be told, and the differences at each rate point.

    Raises:
        ValueError: they are of different rate points.
    """
    if tuple(curve.setting) != tuple(anchor.setting):
        raise ValueError(f"expected a validation at the rate points {curve.setting}, got {anchor.setting}")
    told = ""
    if len(curve.bpp) > 2:
        told = f"{' '.join(f'{gain:+.2f}' for gain in gains(curve, anchor))} dB at its bits; "
        change = bd_rate(curve, anchor)
        told += "" if change is None else f"BD-rate {change:+.1f}%; "
    pairs = zip(curve.setting, curve.psnr, anchor.psnr, curve.bpp, anchor.bpp)
    points = ", ".join(f"{at}: {a - b:+.2f} dB {100 * (c / d - 1):+.1f}%" for at, a, b, c, d in pairs)
    return told + points


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.training.validation", description=__doc__)
    parser.add_argument("weights", type=Path, help="a checkpoint.pt, or a file of states/")
    parser.add_argument("--photos", type=Path, required=True, help="folder that holds the sets as subfolders")
    parser.add_argument("--size", choices=sorted(CONFIGS), default="edge")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--against", type=Path, help="JSON of an earlier one")
    args = parser.parse_args()
    model = TrainableCodec(CONFIGS[args.size]).to(pick_device("auto"))
    model.load_state_dict(weights_to_start_from(args.weights, model.config))
    found = validate(model, args.photos)
    anchors = json.loads(args.against.read_text()) if args.against else {}
    if args.output:
        args.output.write_text(json.dumps({name: asdict(curve) for name, curve in found.items()}, indent=1) + "\n")
    for name, curve in found.items():
        points = ", ".join(f"{q:.2f} dB at {b:.3f}" for b, q in zip(curve.bpp, curve.psnr))
        print(f"{name}: {compared(curve, Curve(**anchors[name])) if name in anchors else points}")


if __name__ == "__main__":
    main()
