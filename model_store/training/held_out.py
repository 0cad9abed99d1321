"""Photographs that no model may learn from: models are measured on them. `python -m model_store.training.held_out`.

A folder of photographs for training may hold some of them under other names, sizes or codecs (63 of the 68 of CBSD68
lie in BSDS500's `val`). `held_out.txt` keeps a fingerprint of each, and `PhotoPool` leaves out what looks like one.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model_store.evaluation.conditions import SETS, clean_paths

FILE = Path(__file__).with_suffix(".txt")

_SIDE, _ALIKE = 16, 24  # of 256 bits; unrelated photographs differ in about 128

_UPSIDE = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180)
"""Ways to turn a photograph that leave its rows rows."""

Bits = NDArray[np.bool_]


def fingerprint(image: Image.Image) -> Bits:
    """(256,) whether each of 16x16 cells is brighter than the one to its left."""
    bits: Bits = (np.diff(np.asarray(_reduced(image), np.int16), axis=1) > 0).ravel()
    return bits


def _reduced(image: Image.Image) -> Image.Image:
    return image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)


@cache
def _known() -> Bits:
    return np.array(
        [np.unpackbits(np.frombuffer(bytes.fromhex(line), np.uint8)) for line in FILE.read_text().split()], bool
    )


def is_held_out(image: Image.Image) -> bool:
    """Whether a photograph looks like one of the evaluation's, turned or mirrored as it may be."""
    upright, turned = _reduced(image), image.convert("L").resize((_SIDE, _SIDE + 1), Image.Resampling.BOX)
    ways = (upright, *((upright if way in _UPSIDE else turned).transpose(way) for way in Image.Transpose))
    return any(bool(((_known() != fingerprint(one)).sum(1) <= _ALIKE).any()) for one in ways)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.training.held_out", description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder with a folder per set of the evaluation")
    args = parser.parse_args()
    lines = []
    for name in SETS:
        for path in clean_paths(args.photos, name):
            with Image.open(path) as image:
                lines.append(np.packbits(fingerprint(image)).tobytes().hex())
    FILE.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} photographs are held out")


if __name__ == "__main__":
    main()
