"""Pictures that nobody took: plain colours, ramps, shapes, grids and lines of text, drawn as they are needed.

Test cards, covered lenses, documents and screens look like these; hardly a photograph does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from model_store.degradations import Kind

DRAWN_SHARES = {Kind.CLEAN: 0.7, Kind.NOISE: 0.12, Kind.SENSOR_NOISE: 0.06, Kind.JPEG: 0.12}
"""What is wrong with drawn pictures: of a plain one nobody can tell whether there is fog before it."""

_Colour = tuple[int, int, int]
_Levels = NDArray[np.float64]

_FAINT, _STRONG = 3.0, 255.0
"""Levels between the colours of a picture, on a logarithmic scale: most pictures are dull."""

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789      .,;:-()"


class Drawings:
    """A pool of drawn pictures (`Pool` in `model_store.training.batches`)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def crops(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """(count, 3, size, size) float32 in [0, 1], whole levels of 8 bits. `generator` is a CPU one."""
        seeds = torch.randint(2**31, (count,), generator=generator).tolist()
        drawn = np.stack([_drawn(size, np.random.default_rng(seed)) for seed in seeds])
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).to(self.device, torch.float32) / 255


def _drawn(size: int, draw: np.random.Generator) -> NDArray[np.uint8]:
    paint = _PAINTERS[int(draw.choice(len(_PAINTERS), p=[share for share, _ in _PAINTERS]))][1]
    grey = draw.uniform(0, 255) + draw.normal(0, 3, 3)
    picture = paint(size, grey if draw.random() < 0.6 else draw.uniform(0, 255, 3), draw)
    if draw.random() < 0.3:
        picture = picture + draw.normal(0, draw.uniform(0.3, 2), picture.shape)
    return picture.round().clip(0, 255).astype(np.uint8)


def _other(colour: _Levels, draw: np.random.Generator) -> _Levels:
    """Another colour, as far from this one as the picture's contrast has it."""
    step = np.exp(draw.uniform(np.log(_FAINT), np.log(_STRONG)))
    direction = draw.choice([-1, 1]) * np.ones(3) if draw.random() < 0.6 else draw.uniform(-1, 1, 3)
    other: _Levels = (colour + step * direction).clip(0, 255)
    return other


def _plain(size: int, colour: _Levels, draw: np.random.Generator) -> _Levels:
    return np.broadcast_to(colour, (size, size, 3))


def _ramp(size: int, colour: _Levels, draw: np.random.Generator) -> _Levels:
    """Towards another colour: along a line, or outwards from a point."""
    i, j = np.indices((size, size)) / size
    if draw.random() < 0.7:
        angle = draw.uniform(0, 2 * np.pi)
        along = i * np.sin(angle) + j * np.cos(angle)
    else:
        along = np.hypot(i - draw.random(), j - draw.random())
    share = (along - along.min()) / np.ptp(along)
    ramp: _Levels = colour + share[..., None] * (_other(colour, draw) - colour)
    return ramp


def _with_pillow(
    paint: Callable[[ImageDraw.ImageDraw, int, _Levels, np.random.Generator], None],
) -> Callable[[int, _Levels, np.random.Generator], _Levels]:
    def painted(size: int, colour: _Levels, draw: np.random.Generator) -> _Levels:
        image = Image.new("RGB", (size, size), _as_colour(colour))
        paint(ImageDraw.Draw(image), size, colour, draw)
        return np.asarray(image, np.float64)

    return painted


def _as_colour(levels: _Levels) -> _Colour:
    red, green, blue = levels.round().clip(0, 255).astype(int).tolist()
    return red, green, blue


def _shapes(on: ImageDraw.ImageDraw, size: int, colour: _Levels, draw: np.random.Generator) -> None:
    shapes = (on.rectangle, on.ellipse, on.line, on.polygon)
    dull = _other(colour, draw)
    for _ in range(draw.integers(1, 13)):
        corner, extent = draw.uniform(-0.2, 1, 2) * size, draw.uniform(0.03, 0.6, 2) * size
        box = [*corner, *(corner + extent)]
        shape = shapes[draw.integers(len(shapes))]
        fill = _as_colour(dull + draw.normal(0, 0.3, 3) * (dull - colour))
        if shape == on.line:
            on.line(box, fill, int(draw.integers(1, 6)))
        elif shape == on.polygon:
            on.polygon([*box, *(draw.random(2) * size)], fill)
        else:
            shape(box, fill)


def _grid(on: ImageDraw.ImageDraw, size: int, colour: _Levels, draw: np.random.Generator) -> None:
    """Lines down, down and across, or a bar chart."""
    fill, step = _as_colour(_other(colour, draw)), int(draw.integers(8, 65))
    width, style = int(draw.integers(1, 4)), draw.integers(3)
    for at in range(int(draw.integers(step)), size, step):
        if style == 2:
            on.rectangle([at, draw.random() * size, at + step // 2, size], fill)
        else:
            on.line([at, 0, at, size], fill, width)
        if style == 1:
            on.line([0, at, size, at], fill, width)


@cache
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(height)


def _text(on: ImageDraw.ImageDraw, size: int, colour: _Levels, draw: np.random.Generator) -> None:
    height = int(np.exp(draw.uniform(np.log(9), np.log(60))))
    fill, margin = _as_colour(_other(colour, draw)), draw.uniform(0, 0.15) * size
    for top in range(int(margin), int(size * draw.uniform(0.3, 1)), int(height * draw.uniform(1.2, 2)) + 1):
        line = "".join(draw.choice(list(_LETTERS), 2 + 2 * size // height))
        on.text((margin, top), line, fill, _font(height))


_PAINTERS = (
    (0.35, _plain),
    (0.2, _ramp),
    (0.2, _with_pillow(_shapes)),
    (0.1, _with_pillow(_grid)),
    (0.15, _with_pillow(_text)),
)
"""How often each kind of picture is drawn, and by whom."""
