"""What can be wrong with a photo, made from clean ones: batched torch, on the device of the photos.

Every kind takes x (B, 3, H, W) float32 in [0, 1] and gives the same shape, not yet clipped; `degrade` applies kinds
per photo and rounds to 8 bits, since that is what a user can upload. The parameters are drawn per photo from `Ranges`;
training and evaluation have ranges of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

Range = tuple[float, float]


class Kind(StrEnum):
    CLEAN = "clean"
    NOISE = "noise"
    SENSOR_NOISE = "sensor-noise"
    RAIN = "rain"
    SNOW = "snow"
    HAZE = "haze"
    LOW_LIGHT = "low-light"
    BLUR = "blur"
    JPEG = "jpeg"


@dataclass(frozen=True)
class Ranges:
    """Bounds of the parameters; each is drawn uniformly unless it says log.

    Lengths, widths and radii are in pixels, angles in radians from the vertical, lights and strengths shares of 1.

    noise: sigma in [0, 1]. read, shot: sensor noise in linear light, log: deviation and variance per unit of light.
    rain_density: drops per pixel of streaks 14 pixels long; longer ones are rarer. rain_strength, snow_strength:
    how much of what is behind a streak or a flake it covers. snow_density: flakes per pixel, log.
    veil: share of the airlight mixed in by what falls far away. haze_thickness: optical depth of the farthest point.
    airlight: of white. light: share of the scene's light that is left, log. jpeg_quality: libjpeg's, 1 to 100.
    mosaic: share of the photos whose sensor noise went through demosaicing.
    sheet, strokes: shares of the rainy photos whose rain is a lit sheet, or sparse strokes.
    """

    noise: Range = (2 / 255, 58 / 255)
    read: Range = (0.002, 0.09)
    shot: Range = (0.0005, 0.035)
    rain_density: Range = (0.001, 0.02)
    rain_length: Range = (7, 40)
    rain_width: Range = (0.5, 1.1)
    rain_angle: Range = (-0.7, 0.7)
    rain_strength: Range = (0.25, 1.0)
    snow_density: Range = (0.0005, 0.006)
    snow_radius: Range = (0.6, 3.0)
    snow_strength: Range = (0.6, 1.0)
    veil: Range = (0.0, 0.2)
    haze_thickness: Range = (0.4, 2.2)
    airlight: Range = (0.65, 1.0)
    light: Range = (0.08, 0.5)
    blur_radius: Range = (0.6, 2.6)
    jpeg_quality: Range = (10, 92)
    mosaic: float = 0.5
    sheet: float = 0.0
    strokes: float = 0.0


TRAINING = Ranges(
    rain_density=(0.001, 0.028),
    rain_length=(7, 52),
    rain_width=(0.5, 2.0),
    rain_angle=(-1.0, 1.0),
    haze_thickness=(0.3, 2.8),
    light=(0.05, 0.5),
    sheet=0.6,
    strokes=0.15,
)
EVALUATION = Ranges(
    rain_density=(0.002, 0.024),
    rain_length=(9, 46),
    rain_angle=(-0.9, 0.9),
    snow_density=(0.0008, 0.007),
    snow_radius=(0.7, 3.3),
    haze_thickness=(0.5, 2.4),
    light=(0.07, 0.45),
    jpeg_quality=(8, 60),
)
"""Own ranges, so that a gain means generalisation: snow and JPEG go beyond training's. Haze, rain and darkness did so
until stage 12 of `base`."""


@dataclass(frozen=True)
class Draw:
    """Random parameters of `count` photos B from one generator, on its device."""

    count: int
    generator: torch.Generator

    def uniform(self, bounds: Range, log: bool = False) -> Tensor:
        """(B, 1, 1, 1) between the bounds, or evenly over their logarithms."""
        u = torch.rand(self.count, 1, 1, 1, generator=self.generator, device=self.generator.device)
        if log:
            low, high = (math.log(bound) for bound in bounds)
            return torch.exp(low + (high - low) * u)
        return bounds[0] + (bounds[1] - bounds[0]) * u

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) of mean 0 and deviation 1."""
        return torch.randn(self.count, *shape, generator=self.generator, device=self.generator.device)

    def field(self, *shape: int) -> Tensor:
        """(B, *shape), uniform in [0, 1)."""
        return torch.rand(self.count, *shape, generator=self.generator, device=self.generator.device)


def to_linear(x: Tensor) -> Tensor:
    """sRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    return torch.where(x <= 0.04045, x / 12.92, ((x.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)


def to_srgb(x: Tensor) -> Tensor:
    """Linear light to sRGB; the inverse of `to_linear` on [0, 1]."""
    x = x.clamp(0, 1)
    return torch.where(x <= 0.0031308, x * 12.92, 1.055 * x.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)


def filter_each(x: Tensor, kernels: Tensor) -> Tensor:
    """Filter every photo with its own kernel. x: (B, C, H, W), kernels: (B, k, k), k odd; edges are reflected."""
    b, c, h, w = x.shape
    reach = kernels.shape[-1] // 2
    padded = F.pad(x, (reach,) * 4, mode="reflect" if reach < min(h, w) else "replicate")
    flat = padded.reshape(1, b * c, *padded.shape[-2:])
    return F.conv2d(flat, kernels[:, None].repeat_interleave(c, 0), groups=b * c).reshape(b, c, h, w)


def _grid(reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    axis = torch.arange(-reach, reach + 1, device=device, dtype=torch.float32)
    return axis[None, :, None], axis[None, None, :]


def line_kernels(length: Tensor, width: Tensor, angle: Tensor) -> Tensor:
    """Soft line segments, (B, k, k), peak 1: the mark of a streak or of a moving camera; angles from the vertical."""
    reach = int(length.max().item() / 2 + 2 * width.max().item()) + 1
    i, j = _grid(reach, length.device)
    return _line(i, j, *(p.reshape(-1, 1, 1) for p in (length, width, angle)))


def _line(i: Tensor, j: Tensor, length: Tensor, width: Tensor, angle: Tensor) -> Tensor:
    along = i * angle.cos() + j * angle.sin()
    across = j * angle.cos() - i * angle.sin()
    return torch.exp(-((across / width) ** 2) / 2) * torch.sigmoid((length / 2 - along.abs()) * 2)


def lines(drops: Tensor, length: Tensor, width: Tensor, angle: Tensor) -> Tensor:
    """A soft line, as in `line_kernels`, for every drop of a random field (B, 1, H, W), going on at the opposite edge.

    By Fourier transform: lines of a hundred pixels would otherwise cost as much as the encoder.
    """
    h, w = drops.shape[2:]
    i, j = (torch.fft.fftfreq(size, 1 / size, device=drops.device) for size in (h, w))
    mark = _line(i[:, None], j, length, width, angle)
    return torch.fft.irfft2(torch.fft.rfft2(drops) * torch.fft.rfft2(mark), s=(h, w))


def disc_kernels(radius: Tensor) -> Tensor:
    """Soft-edged discs, (B, k, k), peak 1: a point of light through a lens out of focus."""
    i, j = _grid(int(radius.max().item()) + 2, radius.device)
    return torch.sigmoid(3 * (radius.reshape(-1, 1, 1) - (i**2 + j**2).sqrt()))


def demosaiced(field: Tensor) -> Tensor:
    """Noise (B, 3, H, W) as bilinear demosaicing of an RGGB mosaic leaves it: correlated, and coarser in R and B."""
    h, w = field.shape[2:]
    even_row, even_column = (torch.arange(size, device=field.device) % 2 == 0 for size in (h, w))
    red, blue = even_row[:, None] & even_column, ~even_row[:, None] & ~even_column
    mosaic = field * torch.stack([red, ~red & ~blue, blue])
    tent = torch.tensor([0.5, 1, 0.5], device=field.device)
    cross = torch.tensor([[0, 0.25, 0], [0.25, 1, 0.25], [0, 0.25, 0]], device=field.device)
    kernels = torch.stack([tent[:, None] * tent, cross, tent[:, None] * tent])
    return F.conv2d(F.pad(mosaic, (1, 1, 1, 1), mode="reflect"), kernels[:, None], groups=3)


def depth_of(x: Tensor, draw: Draw) -> Tensor:
    """A plausible depth, (B, 1, H, W) in [0.3, 1]: far at the top, uneven, with steps where the photo has them."""
    h, w = x.shape[2:]
    slope = torch.linspace(1, 0, h, device=x.device)[None, None, :, None] * draw.uniform((0, 1))
    for cells in (3, 7):
        waves = F.interpolate(draw.field(1, cells, cells), (h, w), mode="bicubic", align_corners=False)
        slope = slope + waves * draw.uniform((0, 1.4)) / cells**0.5
    coarse = F.interpolate(x.mean(1, keepdim=True), (max(1, h // 8), max(1, w // 8)), mode="area")
    light = F.interpolate(coarse, (h, w), mode="bilinear", align_corners=False)
    step = torch.sigmoid((light - draw.uniform((0.3, 0.7))) * draw.uniform((-20, 20)))
    return 0.3 + 0.7 * (slope + step * draw.uniform((0, 0.6))).clamp(0, 1)


def noise(x: Tensor, draw: Draw, ranges: Ranges) -> Tensor:
    return x + draw.uniform(ranges.noise) * draw.normal(*x.shape[1:])


def _exposed(light: Tensor, read: Tensor, shot: Tensor, draw: Draw, ranges: Ranges) -> Tensor:
    """Linear light with shot and read noise, a share of it demosaiced, in sRGB."""
    grain = (read**2 + shot * light).sqrt() * draw.normal(*light.shape[1:])
    return to_srgb(light + torch.where(draw.uniform((0, 1)) < ranges.mosaic, demosaiced(grain), grain))


def sensor_noise(x: Tensor, draw: Draw, ranges: Ranges) -> Tensor:
    """Shot and read noise in linear light."""
    read, shot = draw.uniform(ranges.read, log=True), draw.uniform(ranges.shot, log=True)
    return _exposed(to_linear(x), read, shot, draw, ranges)


def rain(x: Tensor, draw: Draw, ranges: Ranges) -> Tensor:
    """Streaks at two depths, nearly of one direction, screened over the photo, and a veil that grows with depth."""
    veiled = x + (0.8 - x) * draw.uniform(ranges.veil) * depth_of(x, draw)
    length, width = draw.uniform(ranges.rain_length), draw.uniform(ranges.rain_width)
    density, angle = draw.uniform(ranges.rain_density) * 14 / length, draw.uniform(ranges.rain_angle)
    cover = torch.zeros_like(x[:, :1])
    for scale, share in ((0.5, draw.uniform((0, 0.6))), (1.0, 1.0)):
        kernels = line_kernels(length * scale, width * scale**0.5, angle + 0.05 * draw.normal(1, 1, 1))
        drops = (draw.field(1, *x.shape[2:]) < density) * draw.field(1, *x.shape[2:])
        cover = cover + share * filter_each(drops, kernels)
    drawn = veiled + (0.95 - veiled) * (cover * draw.uniform(ranges.rain_strength)).clamp(0, 0.9)
    if not ranges.sheet + ranges.strokes:
        return drawn
    choice = draw.uniform((0, 1))
    lit = torch.where(choice < ranges.sheet, sheet(x, draw), drawn)
    return torch.where(choice > 1 - ranges.strokes, strokes(x, draw), lit)


def _standard(field: Tensor) -> Tensor:
    """Mean 0 and deviation 1 in every photo."""
    return (field - field.mean((2, 3), keepdim=True)) / field.std((2, 3), keepdim=True).clamp_min(1e-3)


def sheet(x: Tensor, draw: Draw) -> Tensor:
    """Rain as light added to the photo: a veil with streaks of two widths, bright at one side, faint at the other."""
    h, w = x.shape[2:]
    turn = draw.uniform((-math.pi, math.pi))
    row, column = (torch.linspace(-0.5, 0.5, size, device=x.device) for size in (h, w))
    slope = column * turn.cos() + 0.5 * h / w * row[:, None] * turn.sin()
    uneven = F.interpolate(draw.field(1, 3, 3), (h, w), mode="bicubic", align_corners=False) - 0.5
    lit = draw.uniform((0.3, 0.9)) + draw.uniform((0, 1.3)) * slope + draw.uniform((0, 0.4)) * uneven
    length, width = draw.uniform((6, 100), log=True), draw.uniform((0.6, 1.8), log=True)
    angle, least = 0.2 * draw.normal(1, 1, 1), draw.uniform((0, 2.5))
    streaks = torch.zeros_like(lit)
    for scale, share in ((1, 1.0), (3, draw.uniform((0, 1)))):
        drops = F.relu(draw.normal(1, h, w) - least)
        streaks = streaks + share * _standard(lines(drops, length, width * scale, angle + 0.03 * draw.normal(1, 1, 1)))
    veil, strength = draw.uniform((0.03, 0.6), log=True), draw.uniform((0.015, 0.12), log=True)
    return x + lit.clamp(0, 1) * F.relu(veil + strength * _standard(streaks))


def strokes(x: Tensor, draw: Draw) -> Tensor:
    """Rain as sparse strokes of light, all nearly of one length and direction, thin to broad, mostly without a veil."""
    length, angle = draw.uniform((12, 60)), draw.uniform((-0.8, 0.8))
    density = draw.uniform((0.0006, 0.006), log=True) * 30 / length
    cover = torch.zeros_like(x[:, :1])
    for width, share in (((0.5, 0.8), 0.4), ((0.9, 1.4), 0.3), ((1.5, 2.5), 0.2), ((2.5, 4), 0.1)):
        drops = (draw.field(1, *x.shape[2:]) < share * density) * (0.3 + 0.7 * draw.field(1, *x.shape[2:]))
        turned = angle + 0.03 * draw.normal(1, 1, 1)
        cover = cover + lines(drops, length * draw.uniform((0.9, 1.1)), draw.uniform(width), turned)
    veil = draw.uniform((0, 0.06)) * (draw.uniform((0, 1)) < 0.3)
    return x + draw.uniform((0.1, 0.45), log=True) * cover.clamp_max(1.6) + veil


def snow(x: Tensor, draw: Draw, ranges: Ranges) -> Tensor:
    """Flakes at three depths, far ones small and dense, near ones large, smeared and rare, behind them a veil."""
    out = x + (0.85 - x) * draw.uniform(ranges.veil) * depth_of(x, draw)
    density, radius = draw.uniform(ranges.snow_density, log=True), draw.uniform(ranges.snow_radius)
    for scale in (0.5, 1.0, 2.0):
        size = (radius * scale / 1.5).clamp_min(0.4)
        kernels = line_kernels(size * 3 * draw.uniform((0, 1)), size, draw.uniform((-1.2, 1.2)))
        flakes = draw.field(1, *x.shape[2:])
        flakes = (flakes < density / scale**2) * (0.4 + 0.6 * draw.field(1, *x.shape[2:]))
        cover = (filter_each(flakes, kernels) * draw.uniform(ranges.snow_strength)).clamp(0, 1)
        out = out + (0.98 - out) * cover
    return out


def haze(x: Tensor, draw: Draw, ranges: Ranges) -> Tensor:
    """Airlight through a depth: x t + A (1 - t), t = exp(-thickness * depth) (Koschmieder)."""
    t = torch.exp(-draw.uniform(ranges.haze_thickness) * depth_of(x, draw))
    airlight = draw.uniform(ranges.airlight) + 0.03 * draw.normal(3, 1, 1)
    return x * t + airlight.clamp(0, 1) * (1 - t)


def low_light(x: Tensor, draw: Draw, ranges: Ranges) -> Tensor:
    """Less light on the sensor, and its noise."""
    light = to_linear(x) * draw.uniform(ranges.light, log=True)
    read, shot = draw.uniform((0.0003, 0.006), log=True), draw.uniform((0.00005, 0.001), log=True)
    return _exposed(light, read, shot, draw, ranges)


def blur(x: Tensor, draw: Draw, ranges: Ranges) -> Tensor:
    """One of three: a camera that moved, a lens out of focus, a soft lens (Gaussian)."""
    radius, choice = draw.uniform(ranges.blur_radius), draw.uniform((0, 3))
    moved = line_kernels(5 * radius * draw.uniform((0.3, 1)), 0.4 * radius, draw.uniform((-math.pi / 2, math.pi / 2)))
    unfocused = disc_kernels(1.5 * radius)
    soft = line_kernels(torch.zeros_like(radius), radius, torch.zeros_like(radius))
    out = x
    for index, kernels in enumerate((moved, unfocused, soft)):
        chosen = (choice >= index) & (choice < index + 1)
        out = torch.where(chosen, filter_each(x, kernels / kernels.sum((1, 2), keepdim=True)), out)
    return out


def _dct_matrix(device: torch.device) -> Tensor:
    k = torch.arange(8, device=device, dtype=torch.float32)
    matrix = torch.cos((2 * k[None, :] + 1) * k[:, None] * math.pi / 16) * math.sqrt(2 / 8)
    matrix[0] /= math.sqrt(2)
    return matrix


# ITU-T T.81, tables K.1 and K.2.
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *((99,) * 8,) * 4,
)  # fmt: skip


def _quantise_blocks(plane: Tensor, table: Tensor) -> Tensor:
    """plane: (B, H, W) in units of 8-bit levels around zero; table: (B, 8, 8)."""
    b, h, w = plane.shape
    padded = F.pad(plane[:, None], (0, -w % 8, 0, -h % 8), mode="replicate")[:, 0]
    hh, ww = padded.shape[1:]
    blocks = padded.reshape(b, hh // 8, 8, ww // 8, 8).transpose(2, 3)
    dct, table = _dct_matrix(plane.device), table[:, None, None]
    blocks = dct.T @ (((dct @ blocks @ dct.T) / table).round() * table) @ dct
    return blocks.transpose(2, 3).reshape(b, hh, ww)[:, :h, :w]


def jpeg(x: Tensor, draw: Draw, ranges: Ranges) -> Tensor:
    """JPEG's loss (ITU-T T.81) with the tables of its annex K scaled as libjpeg does, chroma at half resolution."""
    quality = draw.uniform(ranges.jpeg_quality).round()
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, 0] / 100
    luma, chroma = (
        (torch.tensor(table, device=x.device)[None] * scale + 0.5).floor().clamp(1, 255) for table in (_LUMA, _CHROMA)
    )
    r, g, b = (x.clamp(0, 1) * 255).round().unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    h, w = y.shape[1:]
    y_hat = _quantise_blocks(y - 128, luma) + 128
    planes = []
    for plane in ((b - y) * 0.564, (r - y) * 0.713):
        half = F.interpolate(plane[:, None], ((h + 1) // 2, (w + 1) // 2), mode="area")[:, 0]
        quantised = _quantise_blocks(half, chroma)
        planes.append(F.interpolate(quantised[:, None], (h, w), mode="bilinear", align_corners=False)[:, 0])
    cb, cr = planes
    return torch.stack([y_hat + 1.403 * cr, y_hat - 0.344 * cb - 0.714 * cr, y_hat + 1.773 * cb], 1) / 255


MAKERS: dict[Kind, Callable[[Tensor, Draw, Ranges], Tensor]] = {
    Kind.RAIN: rain,
    Kind.SNOW: snow,
    Kind.HAZE: haze,
    Kind.BLUR: blur,
    Kind.LOW_LIGHT: low_light,
    Kind.NOISE: noise,
    Kind.SENSOR_NOISE: sensor_noise,
    Kind.JPEG: jpeg,
}
"""In the order in which a photo meets them: the air, the lens, the sensor, the file."""


def degrade(x: Tensor, kinds: Sequence[Sequence[Kind]], generator: torch.Generator, ranges: Ranges) -> Tensor:
    """The photos of `degrade_measured`."""
    return degrade_measured(x, kinds, generator, ranges)[0]


def degrade_measured(
    x: Tensor, kinds: Sequence[Sequence[Kind]], generator: torch.Generator, ranges: Ranges
) -> tuple[Tensor, list[dict[Kind, float]]]:
    """Apply to every photo its kinds, in the order of `MAKERS`, and round to 8 bits.

    Args:
        x: (B, 3, H, W) in [0, 1].
        kinds: for each photo the kinds it gets; none, or CLEAN, leaves it as it is.
        generator: on the device of x.

    Returns:
        The photos, and for each the MSE that each of its kinds added to what it was given.
    """
    out = x.clone()
    added_mse: list[dict[Kind, float]] = [{} for _ in kinds]
    for kind, make in MAKERS.items():
        chosen = [index for index, listed in enumerate(kinds) if kind in listed]
        if chosen:
            draw = Draw(len(chosen), generator)
            before = out[chosen]
            after = (make(before, draw, ranges).clamp(0, 1) * 255).round() / 255
            out[chosen] = after
            for index, mse in zip(chosen, (after - before).square().mean((1, 2, 3)).tolist()):
                added_mse[index][kind] = mse
    return out, added_mse
