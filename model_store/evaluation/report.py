"""Tables and plots from the JSON of `model_store/evaluation/results`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator

from model_store.evaluation.conditions import PUBLISHED

RESULTS = Path(__file__).parent / "results"

COLOURS = {
    "LIMPID": "#0b6e99",
    "JPEG": "#9aa0a6",
    "WEBP": "#c58b2b",
    "AVIF": "#7a5195",
    "NLM+WEBP": "#e5c494",
    "NLM+AVIF": "#bc9bd3",
}


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


@dataclass(frozen=True)
class Curve:
    """Means over the photos of a set, one point per setting, by growing bpp."""

    bpp: tuple[float, ...]
    psnr: tuple[float, ...]
    setting: tuple[int, ...]

    def psnr_at(self, bpp: float) -> float:
        """PSNR at a rate, by PCHIP over log rate; beyond the ends of the curve too."""
        return float(PchipInterpolator(np.log(self.bpp), self.psnr)(np.log(bpp)))

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


def bd_rate(curve: Curve, anchor: Curve) -> float | None:
    """Bjontegaard's mean difference of rate in percent over the shared range of PSNR, by PCHIP on log rate.

    None where the curves share no quality, or are not monotone.
    """
    low, high = max(curve.psnr[0], anchor.psnr[0]), min(curve.psnr[-1], anchor.psnr[-1])
    if low >= high or (np.diff(curve.psnr) <= 0).any() or (np.diff(anchor.psnr) <= 0).any():
        return None
    ours, theirs = (PchipInterpolator(c.psnr, np.log(c.bpp)).integrate(low, high) for c in (curve, anchor))
    return float(100 * (np.exp((ours - theirs) / (high - low)) - 1))


def table(records: Sequence[Record], bpp: float = 0.5) -> str:
    """A Markdown table: the best PSNR within one rate per set, condition and codec, and BD-rate against each peer."""
    all_curves = curves(records)
    codecs = sorted({codec for *_, codec in all_curves}, key=lambda c: (c not in COLOURS, list(COLOURS).index(c)))
    peers = [codec for codec in codecs if codec != "LIMPID"]
    head = [
        "set",
        "condition",
        "input dB",
        *(f"{c} dB within {bpp}" for c in codecs),
        *(f"BD-rate vs {p}" for p in peers),
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, condition in dict.fromkeys((s, c) for s, c, _ in all_curves):
        cells = [name, condition, "" if condition == "clean" else f"{input_psnr(records, name, condition):.2f}"]
        for codec in codecs:
            curve = all_curves.get((name, condition, codec))
            value = curve.psnr_within(bpp) if curve else None
            cells.append("-" if value is None else f"{value:.2f}")
        for peer in peers:
            ours, theirs = all_curves.get((name, condition, "LIMPID")), all_curves.get((name, condition, peer))
            change = bd_rate(ours, theirs) if ours and theirs else None
            cells.append("-" if change is None else f"{change:+.0f}%")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def published_table(records: Sequence[Record]) -> str:
    """A Markdown table: the model on Kodak with sensor noise at the rates that Cheng et al. report."""
    lines = ["| condition | bpp | Cheng et al. dB | LIMPID within it, dB | difference |", "|---|---|---|---|---|"]
    all_curves = curves(records)
    for condition, points in PUBLISHED.items():
        curve = all_curves.get(("kodak", condition, "LIMPID"))
        for bpp, theirs in points:
            ours = curve.psnr_within(bpp) if curve else None
            told = ("-", "-") if ours is None else (f"{ours:.2f}", f"{ours - theirs:+.2f}")
            lines.append(f"| {condition} | {bpp} | {theirs:.2f} | {told[0]} | {told[1]} |")
    return "\n".join(lines)


def plot(records: Sequence[Record], folder: Path) -> list[Path]:
    """One PNG per set with a panel per condition: PSNR over bpp for every codec, and the input's PSNR."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    all_curves, paths = curves(records), []
    for name in dict.fromkeys(s for s, *_ in all_curves):
        conditions = list(dict.fromkeys(c for s, c, _ in all_curves if s == name))
        columns = min(4, len(conditions))
        rows = -(-len(conditions) // columns)
        figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.6 * rows), squeeze=False)
        for axis, condition in zip(axes.flat, conditions):
            for (s, c, codec), curve in all_curves.items():
                if (s, c) == (name, condition):
                    axis.plot(curve.bpp, curve.psnr, "o-", ms=3, label=codec, color=COLOURS[codec])
            if condition != "clean":
                axis.axhline(input_psnr(records, name, condition), color="#c0392b", lw=0.8, ls=":", label="input")
            axis.set(
                title=f"{name}, {condition}", xlabel="bits per pixel", ylabel="PSNR against clean, dB", xlim=(0, 1.5)
            )
            axis.grid(alpha=0.3)
        axes.flat[0].legend()
        figure.tight_layout()
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=80)
        pyplot.close(figure)
    return paths
