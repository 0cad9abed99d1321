"""What one photo cost and lost (`Record`), means over photos (`Curve`), and curves against each other."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator

from model_store.evaluation.conditions import Sample
from model_store.images import Photo, psnr


@dataclass(frozen=True)
class Record:
    """One photo through one codec at one setting: bytes on disk and PSNR against the clean photo."""

    set: str
    photo: str
    condition: str
    codec: str
    setting: int
    bytes: int
    bpp: float
    psnr: float

    @classmethod
    def of(cls, set: str, sample: Sample, codec: str, setting: int, size: int, decoded: Photo) -> Record:
        """Of a photo that a codec gave back, from a file of `size` bytes."""
        bpp = round(8 * size / (sample.clean.shape[0] * sample.clean.shape[1]), 5)
        value = round(psnr(decoded, sample.clean), 4)
        return cls(set, sample.photo, sample.condition.name, codec, setting, size, bpp, value)


BUDGET = 0.5
"""Bits per pixel within which codecs are compared."""


@dataclass(frozen=True)
class Curve:
    """Means over the photos of a set, one point per setting, by growing bpp."""

    bpp: tuple[float, ...]
    psnr: tuple[float, ...]
    setting: tuple[int, ...]

    def psnr_at(self, bpp: float) -> float:
        """PSNR at a rate, by PCHIP over log rate; beyond the ends of the curve too."""
        best = dict(sorted(zip(self.bpp, self.psnr)))  # the better of two at one rate
        return float(PchipInterpolator(np.log(list(best)), list(best.values()))(np.log(bpp)))

    def psnr_within(self, bpp: float) -> float | None:
        """The best PSNR that a budget of rate allows; None below the smallest rate.

        Not the PSNR at that rate: of a noisy photo a codec that keeps the noise is worse the more it spends.
        """
        if bpp < self.bpp[0]:
            return None
        within = [psnr for rate, psnr in zip(self.bpp, self.psnr) if rate <= bpp]
        if bpp < self.bpp[-1]:
            within.append(self.psnr_at(bpp))
        return max(within)


def read_records(paths: Iterable[Path]) -> list[Record]:
    """All records of some result files."""
    return [Record(**record) for path in paths for record in json.loads(path.read_text())["records"]]


def check_same_photos(records: Sequence[Record]) -> None:
    """Means can be compared where they are of the same photos.

    Raises:
        ValueError: of a set and condition some codecs, or settings of one, have others than the rest.
    """
    photos: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for record in records:
        photos[record.set, record.condition][f"{record.codec} at {record.setting}"].add(record.photo)
    for (name, condition), of_codecs in photos.items():
        counts = {codec: len(seen) for codec, seen in of_codecs.items()}
        if len({frozenset(seen) for seen in of_codecs.values()}) > 1:
            raise ValueError(f"expected the same photos of {name} under {condition} from every codec, got {counts}")


def curves(records: Sequence[Record]) -> dict[tuple[str, str, str], Curve]:
    """(set, condition, codec) to its curve. The codec `INPUT`, the upload itself (bytes 0), is left out."""
    points: dict[tuple[str, str, str], dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.bytes:
            points[record.set, record.condition, record.codec][record.setting].append(record)
    result = {}
    for key, settings in points.items():
        means = sorted(
            (float(np.mean([r.bpp for r in group])), float(np.mean([r.psnr for r in group])), setting)
            for setting, group in settings.items()
        )
        result[key] = Curve(*(tuple(column) for column in zip(*means)))
    return result


def input_psnr(records: Sequence[Record], name: str, condition: str) -> float:
    """Mean PSNR of the degraded photos themselves."""
    chosen = [r.psnr for r in records if r.set == name and r.condition == condition and not r.bytes]
    return float(np.mean(chosen))


LEAST_OVERLAP_DB = 1.0


def frontier(curve: Curve) -> Curve:
    """The points that no cheaper one equals: of a noisy photo a codec may be worse the more it spends."""
    best, kept = -np.inf, []
    for point in zip(curve.bpp, curve.psnr, curve.setting):
        if point[1] > best:
            best = point[1]
            kept.append(point)
    return Curve(*(tuple(column) for column in zip(*kept)))


def bd_rate(curve: Curve, anchor: Curve) -> float | None:
    """Bjontegaard's mean difference of rate in percent at equal PSNR, by PCHIP on log rate, of both frontiers.

    None where they share less than `LEAST_OVERLAP_DB`: over less it tells little.
    """
    ours, theirs = frontier(curve), frontier(anchor)
    low, high = max(ours.psnr[0], theirs.psnr[0]), min(ours.psnr[-1], theirs.psnr[-1])
    if high - low < LEAST_OVERLAP_DB:
        return None
    areas = [PchipInterpolator(c.psnr, np.log(c.bpp)).integrate(low, high) for c in (ours, theirs)]
    return float(100 * (np.exp((areas[0] - areas[1]) / (high - low)) - 1))
