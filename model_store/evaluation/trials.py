"""Trials beside rate and distortion: does a model name flaws, does it wear photos out, how do real ones look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from model_store.degradations import EVALUATION, Kind, degrade
from model_store.evaluation.codecs import LimpidCodec
from model_store.evaluation.conditions import clean_paths
from model_store.images import as_tensor, psnr, read_rgb
from service.codec.shipped import pad_to_stride

NAMING_RATE, GENERATION_RATE, SHEET_RATE = 4, 6, 5
GENERATIONS = 10
_WIDTH, _COLUMNS = 330, 3  # of a contact sheet: pixels of a photo, and pairs in a row

_SAME = {Kind.SENSOR_NOISE: Kind.NOISE}  # the report tells no kind of noise from another
_SEED = 9012


def naming(codec: LimpidCodec, root: Path, limit: int | None = None) -> dict[str, object]:
    """What the model calls photos with one flaw, or none, of the generator with the ranges of evaluation.

    Every photo of Kodak is shown once with each kind. Right is a report whose first, strongest, kind is the one.
    """
    paths = clean_paths(root, "kodak")[:limit]
    said: dict[Kind, Counter[str]] = {kind: Counter() for kind in Kind}
    only: Counter[Kind] = Counter()
    for index, path in enumerate(tqdm(paths, desc="naming")):
        x = as_tensor(read_rgb(path))
        for kind, names in said.items():
            degraded = degrade(x, [(kind,)], torch.Generator().manual_seed(_SEED + index), EVALUATION)
            rate = torch.tensor([NAMING_RATE - 1], device=codec.device)
            (found,) = codec.codec.analyse(pad_to_stride(degraded.to(codec.device)), rate)[2]
            labels = [one.kind.label for one in found] or ["unknown"]
            names[labels[0]] += 1
            only[kind] += labels == [_SAME.get(kind, kind).value]
    right = {kind: names[_SAME.get(kind, kind).value] for kind, names in said.items()}
    summary = {
        "photos": len(paths),
        "right": round(sum(right.values()) / (len(paths) * len(said)), 4),
        "right_and_nothing_else": round(sum(only.values()) / (len(paths) * len(said)), 4),
        **{kind.value: round(count / len(paths), 4) for kind, count in right.items()},
    }
    return {"summary": summary, "said": {kind.value: dict(names.most_common()) for kind, names in said.items()}}


def generations(codec: LimpidCodec, root: Path, limit: int | None = None) -> dict[str, object]:
    """PSNR against the original of Kodak's photos, compressed and restored again and again."""
    rows: dict[str, list[float]] = {}
    for path in tqdm(clean_paths(root, "kodak")[:limit], desc="generations"):
        original = photo = read_rgb(path)
        rows[path.stem] = []
        for _ in range(GENERATIONS):
            ((_, photo),) = codec.round_trip(photo, [GENERATION_RATE])
            rows[path.stem].append(round(psnr(photo, original), 3))
    losses = [values[0] - values[-1] for values in rows.values()]
    summary = {
        "rate": GENERATION_RATE,
        "generations": GENERATIONS,
        "mean_loss_db": round(float(np.mean(losses)), 3),
        "largest_loss_db": round(max(losses), 3),
    }
    return {"summary": summary, "psnr": rows}


def contact_sheet(codec: LimpidCodec, paths: Sequence[Path]) -> Image.Image:
    """Photos before and after, side by side, with bits per pixel and what the model's report says."""
    cells = []
    for path in tqdm(paths, desc="sheet"):
        before = read_rgb(path)
        ((stream, after),) = codec.round_trip(before, [SHEET_RATE])
        found = ", ".join(f"{one.kind.label} {one.strength:.2f}" for one in stream.degradations) or "no report"
        text = f"{path.stem}: {8 * len(stream.to_bytes()) / stream.pixels:.2f} bpp, {found}"
        height = round(_WIDTH * before.shape[0] / before.shape[1])
        cell = Image.new("RGB", (2 * _WIDTH, height + 14), "white")
        for at, photo in ((0, before), (_WIDTH, after)):
            cell.paste(Image.fromarray(photo).resize((_WIDTH, height), Image.Resampling.LANCZOS), (at, 14))
        ImageDraw.Draw(cell).text((3, 1), text, "black")
        cells.append(cell)
    rows = [cells[at : at + _COLUMNS] for at in range(0, len(cells), _COLUMNS)]
    sheet = Image.new("RGB", (_COLUMNS * (2 * _WIDTH + 6), sum(max(c.height for c in row) for row in rows)), "white")
    top = 0
    for row in rows:
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * (2 * _WIDTH + 6), top))
        top += max(cell.height for cell in row)
    return sheet
