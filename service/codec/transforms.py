"""The float side of the codec: analysis g_a, synthesis g_s, hyper analysis h_a and the gains of the rate points.

These run in any precision on any device. What must be exact (z_hat to mu and scale) lives in `prior.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from service.codec.blocks import HATB
from service.codec.config import LAMBDA_RANGE, RATE_POINTS, CodecConfig, Stage

_Part = TypeVar("_Part", bound=nn.Module)

GAIN_ANCHORS = (1.8, 14.0)
"""Latent gains that training starts from, at the smallest and at the best rate point."""


def asinh(x: Tensor) -> Tensor:
    """torch's own takes three times as long on a CPU."""
    return (x.abs() + (x.square() + 1).sqrt()).log().copysign(x)


def rate_position(rate: Tensor) -> Tensor:
    """Map rate indexes 0..7 to q in [0, 1]."""
    return rate.to(torch.float32) / (RATE_POINTS - 1)


def rate_lambda(rate: Tensor) -> Tensor:
    """rate: (B,) indexes 0..7. Returns (B,), log-spaced over the rate points."""
    low, high = LAMBDA_RANGE
    return low * (high / low) ** rate_position(rate)


class _Undrawn(TorchFunctionMode):
    """No weights are drawn at random within: drawing those of ten models, to be replaced, takes half a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        drawing = getattr(func, "__module__", None) == "torch.nn.init"
        return None if drawing else func(*args, **(kwargs or {}))


def with_weights(build: Callable[[], _Part], weights: Mapping[str, Tensor]) -> _Part:
    """A part with these weights, the tensors themselves.

    Raises:
        RuntimeError: they do not fit it.
    """
    with _Undrawn():
        part = build()
    part.load_state_dict(weights, assign=True)
    return part


class RateGain(nn.Module):
    """A positive gain per channel and rate point: two anchors, interpolated in the log domain (as DCVC-FM does)."""

    def __init__(self, dim: int, low: float = 1.0, high: float = 1.0) -> None:
        super().__init__()
        self.log_low = nn.Parameter(torch.full((dim,), math.log(low)))
        self.log_high = nn.Parameter(torch.full((dim,), math.log(high)))

    def forward(self, rate: Tensor) -> Tensor:
        """rate: (B,) indexes 0..7. Returns (B, dim, 1, 1)."""
        q = rate_position(rate)[:, None]
        return torch.exp(self.log_low * (1 - q) + self.log_high * q)[:, :, None, None]


class BlockStack(nn.Module):
    """The HATBs of one stage, entered through a gain of the rate point."""

    def __init__(self, stage: Stage, config: CodecConfig) -> None:
        super().__init__()
        self.gain = RateGain(stage.dim)
        self.blocks = nn.Sequential(
            *(HATB(stage.dim, config.heads_of(stage.dim), config.ffn) for _ in range(stage.blocks))
        )

    def forward(self, x: Tensor, rate: Tensor) -> Tensor:
        """x: (B, C, H, W), rate: (B,) indexes 0..7. Returns the shape of x."""
        return self.blocks((x * self.gain(rate)).contiguous(memory_format=torch.channels_last))


class Resample(nn.Module):
    """A pixel (un)shuffle with a convolution, in float32 under any autocast: the residual stream and the pixels
    need it. (cuDNN may round its operands to TF32, which moves about one value of a hundred by one level.)

    The convolution is 1x1 on the coarse side, or with `overlap` 3x3 on the side that it comes from.
    """

    def __init__(self, inputs: int, outputs: int, factor: int, up: bool, overlap: bool = False) -> None:
        super().__init__()
        self.factor, self.up, self.overlap = factor, up, overlap
        kernel = 3 if overlap else 1
        if not up and overlap:
            outputs //= factor**2
        elif not up:
            inputs *= factor**2
        else:
            outputs *= factor**2
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (B, C', H f, W f) going up, else (B, C', H / f, W / f), f the factor."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.up:
                return F.pixel_shuffle(self.conv(x), self.factor)
            if self.overlap:
                return F.pixel_unshuffle(self.conv(x), self.factor)
            # A pixel unshuffle and then the 1x1 convolution, as one of stride `factor`.
            weight = self.conv.weight.view(len(self.conv.weight), -1, self.factor, self.factor)
            return F.conv2d(x, weight, self.conv.bias, stride=self.factor)


class Analysis(nn.Module):
    """g_a: x (B, 3, H, W) in [0, 1] with H and W multiples of 16 -> y (B, N, H/16, W/16).

    x - 1/2 -> stem -> [gain, HATBs, down]... -> gain, HATBs -> latent gain -> y
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.watched = config.watched
        overlap = config.stem == 1
        self.stem = Resample(3, config.stages[0].dim, config.stem, up=False, overlap=overlap)
        self.stacks = nn.ModuleList(BlockStack(stage, config) for stage in config.stages)
        self.downs = nn.ModuleList(
            Resample(fine.dim, coarse.dim, 2, up=False, overlap=overlap) for fine, coarse in pairwise(config.stages)
        )
        self.gain = RateGain(config.latents, *GAIN_ANCHORS)

    def forward(self, x: Tensor, rate: Tensor, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """`watch` is shown the features (B, C, H/8, W/8) that enter the watched stage, as 0, and leave it, as 1."""
        x = x - 0.5
        for index, (enter, stack) in enumerate(zip([self.stem, *self.downs], self.stacks)):
            x = enter(x)
            if watch and index == self.watched:
                watch(0, x)
            x = stack(x, rate)
            if watch and index == self.watched:
                watch(1, x)
        return x.float() * self.gain(rate)


class Synthesis(nn.Module):
    """g_s: y_hat (B, N, H/16, W/16) -> x_hat (B, 3, H, W), not clipped; the mirror of g_a."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.gain = RateGain(config.latents, *(1 / gain for gain in GAIN_ANCHORS))
        overlap = config.stem == 1
        coarse_first = config.stages[::-1]
        self.stacks = nn.ModuleList(BlockStack(stage, config) for stage in coarse_first)
        self.ups = nn.ModuleList(
            Resample(coarse.dim, fine.dim, 2, up=True, overlap=overlap) for coarse, fine in pairwise(coarse_first)
        )
        self.head = Resample(config.stages[0].dim, 3, config.stem, up=True, overlap=overlap)

    def forward(self, y_hat: Tensor, rate: Tensor) -> Tensor:
        x = self.stacks[0](y_hat * self.gain(rate), rate)
        for up, stack in zip(self.ups, list(self.stacks)[1:]):
            x = stack(up(x), rate)
        return self.head(x) + 0.5


class HyperAnalysis(nn.Module):
    """h_a: y over its deviation (B, N, h, w) -> z (B, hyper, ceil(h/4), ceil(w/4)), not rounded."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width = config.features
        self.enter = nn.Conv2d(config.latents, width, 1)
        self.down1 = Resample(width, width, 2, up=False)
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.down2 = Resample(width, config.hyper, 2, up=False)
        nn.init.normal_(self.down2.conv.weight, std=4 * (4 * width) ** -0.5)  # z must not round to zero at first

    def forward(self, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            h, w = y.shape[-2:]
            y = F.pad(y, (0, -w % 4, 0, -h % 4), mode="replicate")
            # A square-root-like squash: the largest coefficients are 100 times the typical one.
            x = F.gelu(self.enter(asinh(y)))
            x = F.gelu(self.down1(x))
            return self.down2(F.gelu(x + self.local(x)))
