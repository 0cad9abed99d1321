"""`python -m model_store.training.curves LOG PNG`: draw loss, rate and quality of a run from its JSON log."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

_PANELS = (
    ("loss", "loss"),
    ("bpp", "bits per pixel"),
    ("psnr", "PSNR, dB"),
    ("clean_psnr", "PSNR of clean photos, dB"),
)


def draw(log: Path, output: Path, window: int = 20) -> None:
    """One panel per quantity over steps: each logged mean, and its running mean over `window` of them."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    panels = [(name, title) for name, title in _PANELS if any(name in line for line in lines)]
    figure = Figure((4 * len(panels), 3.2))
    (axes,) = figure.subplots(1, len(panels), squeeze=False)
    for axis, (name, title) in zip(axes, panels):
        points = [(line["step"], line[name]) for line in lines if name in line]
        steps, values = np.array(points).T
        axis.plot(steps, values, color="#c9d6de", lw=0.8)
        if len(values) >= window:
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axis.plot(steps[window - 1 :], smooth, color="#0b6e99", lw=1.6)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(output, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.training.curves", description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    draw(args.log, args.output)


if __name__ == "__main__":
    main()
