"""`python -m model_store.training.ablations`: what each part of the design is worth, at equal and small budgets.

Every variant is `edge`, trained from the same seed for the same time on the same photos, shipped, and measured on real
bytes; the table gives its BD-rate against the whole design, so that more than 0% means that the part saves bits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from model_store.evaluation.codecs import LimpidCodec
from model_store.evaluation.conditions import degraded_photo
from model_store.evaluation.rate_distortion import Curve, bd_rate
from model_store.images import psnr, read_rgb
from model_store.training.export import export
from model_store.training.loop import train
from model_store.training.schedule import Schedule
from service.codec import exact, prior
from service.codec.blocks import HATB
from service.codec.model import TrainableCodec
from service.codec.prior import PriorNet

CONDITIONS, RATES, EVERY = ("clean", "noise-25", "rain"), (2, 4, 6, 8), 6


def _silence(branch: str) -> Callable[[TrainableCodec], None]:
    """Freeze a branch of all blocks at zero, where a fresh block has it."""

    def prepare(model: TrainableCodec) -> None:
        for block in (module for module in model.modules() if isinstance(module, HATB)):
            out = getattr(block, branch).out.weight
            out.requires_grad_(False).zero_()

    return prepare


def _with_noise(model: TrainableCodec) -> None:
    model.noisy = True


def _without_context(model: TrainableCodec) -> None:
    model.prior.context_limit = 0


@contextmanager
def _float_prior() -> Iterator[None]:
    """Nothing of the prior is rounded while it trains: its integers come afterwards."""

    def same(x: Tensor) -> Tensor:
        return x

    def clamped(acc: Tensor, low: float, high: float) -> Tensor:
        return exact.ste_clamp(acc - 0.5, low, high)  # the half was there to be rounded

    with (
        mock.patch.object(exact, "ste_round", same),
        mock.patch.object(exact, "requantise", clamped),
        mock.patch.object(prior, "requantise", clamped),
    ):
        yield


@dataclass(frozen=True)
class Variant:
    name: str
    prepare: Callable[[TrainableCodec], None] | None = None
    warm: bool = True
    quantised: bool = True


VARIANTS = (
    Variant("whole"),
    Variant("C-GA off", _silence("content")),
    Variant("S-DA off", _silence("degradation")),
    Variant("cold start", warm=False),
    Variant("one pass (no context)", _without_context),
    Variant("integers after training", quantised=False),
    Variant("noise instead of rounding", _with_noise),
)


def _measure(codec: LimpidCodec, photos: Path) -> dict[str, Curve]:
    """Mean bpp and PSNR over every sixth photo of Kodak, per condition."""
    paths = list(enumerate(sorted((photos / "kodak").glob("*.png"))))[::EVERY]
    result = {}
    for condition in CONDITIONS:
        points: dict[int, list[tuple[float, float]]] = {rate: [] for rate in RATES}
        for index, path in paths:
            clean = read_rgb(path)
            for stream, restored in codec.round_trip(degraded_photo(clean, index, condition), RATES):
                points[stream.rate].append((8 * len(stream.to_bytes()) / stream.pixels, psnr(restored, clean)))
        means = [np.mean(values, 0).tolist() for values in points.values()]
        result[condition] = Curve(tuple(m[0] for m in means), tuple(m[1] for m in means), RATES)
    return result


def _trained(variant: Variant, args: argparse.Namespace) -> Path:
    schedule = Schedule(args.minutes, lr=4e-4, prior_lr=1e-3, steady=0.4)
    with nullcontext() if variant.quantised else _float_prior():
        return train(
            photos=args.photos, run=args.run / variant.name.replace(" ", "-"), size="edge", schedule=schedule,
            batch=8, crop=128, seed=3, warm=variant.warm, prepare=variant.prepare, compiled=args.minutes > 1,
        )  # fmt: skip


def _shipped(checkpoint: Path, name: str, without_context: bool) -> LimpidCodec:
    store = checkpoint.parent / name
    store.mkdir(exist_ok=True)
    (store / "store.json").unlink(missing_ok=True)
    with mock.patch.object(PriorNet, "context_limit", 0) if without_context else nullcontext():
        export(checkpoint, name, store)
    return LimpidCodec(store)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.training.ablations", description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder to train on")
    parser.add_argument("--evaluate-on", type=Path, required=True, help="folder that holds kodak/")
    parser.add_argument("--run", type=Path, required=True, help="folder for the runs; finished ones are not repeated")
    parser.add_argument("--minutes", type=float, default=6, help="of each variant")
    parser.add_argument("--result", type=Path, help="JSON file to write")
    args = parser.parse_args()
    measured: dict[str, dict[str, Curve]] = {}
    for variant in VARIANTS:
        checkpoint = _trained(variant, args)
        measured[variant.name] = _measure(
            _shipped(checkpoint, "ema", variant.prepare is _without_context), args.evaluate_on
        )
        if variant.name == "whole":
            state = torch.load(checkpoint, weights_only=True)
            raw = checkpoint.with_name("raw.pt")
            torch.save({**state, "ema": state["model"]}, raw)
            measured["EMA off"] = _measure(_shipped(raw, "raw", False), args.evaluate_on)
    rows = []
    for name, curves in measured.items():
        rates = {c: bd_rate(curve, measured["whole"][c]) for c, curve in curves.items()}
        rows.append({"variant": name, "bd_rate": rates, "psnr": {c: curve.psnr for c, curve in curves.items()},
                     "bpp": {c: curve.bpp for c, curve in curves.items()}})  # fmt: skip
        print(name, {c: None if rate is None else f"{rate:+.1f}%" for c, rate in rates.items()})
    if args.result:
        args.result.write_text(json.dumps({"minutes": args.minutes, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
