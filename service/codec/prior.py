"""The exact prior: from z_hat to the mean and the scale index of every latent, in integers only.

    z_hat -> h_s -> features -> pass 0 -> mu, scale index of half the latents
                        |                       | y_hat of that half
                        +------> pass 1 <-------+    -> mu, scale index of the other half

The halves are a checkerboard over row, column and channel, so that in the second pass every latent has its four
neighbours and the channels beside it (the two-pass dual spatial prior of DCVC-HEM / DCVC-FM; no serial decoding).

`PriorNet` holds the float parameters that are trained; `ExactPrior` is the arithmetic. Training runs the very same
arithmetic on integers derived from the parameters; a shipped model holds only the integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.codec.config import RATE_POINTS, CodecConfig
from service.codec.exact import (
    FLOAT32_EXACT,
    FLOAT64_EXACT,
    FRACTION,
    LIMIT,
    IntegerLayer,
    TrainableLayer,
    depthwise,
    pointwise,
    power_of_two,
    requantise,
    straight_clamp,
)
from service.codec.tables import SCALE_LEVELS, Z_LIMIT, scale_to_level

MEAN_FRACTION = 4
"""Fractional bits of mu and y_hat: they are multiples of 1/16."""
MEAN_LIMIT = 2**15
SCALE_FRACTION = 3
_NORMAL_MEAN_FRACTION = 9
_NORMAL_MEAN_LIMIT = 8191
_MEAN_MANTISSA = 2047
_CONTEXT_MANTISSA = 255


@dataclass(frozen=True)
class PriorOutput:
    """What one pass says of every latent: `mean` (B, N, h, w) in sixteenths and `level` (B, N, h, w), indexes 0..63."""

    mean: Tensor
    level: Tensor


@dataclass(frozen=True)
class Rescale:
    """An integer multiplication per channel and rate point, x -> floor((x * factor + 2^(shift-1)) * 2^-shift) clamped.

    Attributes:
        factor, shift: (8, C) integers.
        limit: the clamp of the result.
    """

    factor: Tensor
    shift: Tensor
    limit: int

    def __call__(self, x: Tensor, rate: Tensor) -> Tensor:
        factor, shift = self.factor[rate][:, :, None, None], self.shift[rate][:, :, None, None]
        return requantise(x * factor, shift, -self.limit, self.limit)

    def to(self, device: torch.device, dtype: torch.dtype) -> Rescale:
        return Rescale(self.factor.to(device, dtype), self.shift.to(device, dtype), self.limit)

    @classmethod
    def nearest(cls, value: Tensor, mantissa: int, limit: int) -> Rescale:
        """The integers closest to multiplying by `value` (8, C), with factors up to `mantissa`."""
        shift = (mantissa / value).log2().floor().clamp(0, 30)
        return cls((value * power_of_two(shift)).round().clamp(1, mantissa), shift, limit)


def half_mask(channels: int, h: int, w: int, device: torch.device) -> Tensor:
    """(channels, h, w) bool: the latents of pass 0. Its complement is pass 1."""
    c = torch.arange(channels, device=device)[:, None, None]
    i = torch.arange(h, device=device)[None, :, None]
    j = torch.arange(w, device=device)[None, None, :]
    return (c + i + j) % 2 == 0


@dataclass(frozen=True)
class ExactPrior:
    """The integers of a prior and their arithmetic. `rate` is always (B,) int64, indexes 0..7."""

    layers: dict[str, IntegerLayer]
    mean_rescale: Rescale
    context_rescale: Rescale

    def to(self, device: torch.device) -> ExactPrior:
        """Move to a device, each layer in the narrowest carrier that is exact for it.

        Raises:
            ValueError: a layer could leave float64's exact range.
        """
        return ExactPrior(
            {name: layer.to(device, carrier(name, layer)) for name, layer in self.layers.items()},
            self.mean_rescale.to(device, torch.float32),
            self.context_rescale.to(device, torch.float32),
        )

    def _run(
        self, kind: Callable[[Tensor, IntegerLayer, Tensor], Tensor], name: str, x: Tensor, rate: Tensor
    ) -> Tensor:
        layer = self.layers[name]
        return kind(x.to(layer.weight.dtype), layer, rate).to(torch.float32)

    def features(self, z_hat: Tensor, rate: Tensor, h: int, w: int) -> Tensor:
        """h_s: z_hat (B, hyper, ceil(h/4), ceil(w/4)) integers -> features (B, F, h, w) integers."""
        x = self._run(pointwise, "enter", z_hat, rate)
        x = F.pixel_shuffle(self._run(pointwise, "up1", x + self._run(depthwise, "local1", x, rate), rate), 2)
        x = F.pixel_shuffle(self._run(pointwise, "up2", x + self._run(depthwise, "local2", x, rate), rate), 2)
        return x[:, :, :h, :w]

    def first_pass(self, features: Tensor, rate: Tensor) -> PriorOutput:
        x = self._run(depthwise, "first_local", features, rate)
        x = self._run(pointwise, "first_hidden", torch.cat([features, x], 1), rate)
        return self._outputs("first", x, rate)

    def second_pass(self, features: Tensor, y_hat: Tensor, rate: Tensor) -> PriorOutput:
        """y_hat: (B, N, h, w) in sixteenths, zero where pass 1 has yet to speak."""
        known = self.context_rescale(straight_clamp(y_hat, -MEAN_LIMIT, MEAN_LIMIT), rate)
        near = self._run(depthwise, "second_near", known, rate)
        wide = self._run(depthwise, "second_wide", known, rate)
        x = self._run(pointwise, "second_merge", torch.cat([features, known, near, wide], 1), rate)
        x = x + self._run(depthwise, "second_local", x, rate)
        x = self._run(pointwise, "second_hidden", x, rate)
        return self._outputs("second", x, rate)

    def _outputs(self, name: str, x: Tensor, rate: Tensor) -> PriorOutput:
        mean = self.mean_rescale(self._run(pointwise, f"{name}_mean", x, rate), rate)
        return PriorOutput(mean, self._run(pointwise, f"{name}_level", x, rate))


_SUMS = {"up1", "up2", "second_hidden"}
"""Layers whose input is a sum of two activations and so reaches twice the limit."""


def input_limit(name: str) -> int:
    """The largest magnitude of the inputs of a layer of the prior."""
    if name == "enter":
        return Z_LIMIT
    return 2 * LIMIT if name in _SUMS else LIMIT


def carrier(name: str, layer: IntegerLayer) -> torch.dtype:
    """The narrowest float type whose exact range holds every partial sum of the layer.

    Raises:
        ValueError: not even float64's does.
    """
    bound = layer.bound(input_limit(name))
    if bound < FLOAT32_EXACT:
        return torch.float32
    if bound < FLOAT64_EXACT:
        return torch.float64
    raise ValueError(f"layer {name}: partial sums up to {bound:.3g} leave the exact range of float64 (2^53)")


class PriorNet(nn.Module):
    """The float parameters of the prior.

    `deviation` (N,) is the typical deviation of each latent before its gain; the integers that normalise y_hat and
    denormalise the mean follow it and the latent gains of g_a. With a `context_limit` of 0, pass 1 sees nothing of
    pass 0.
    """

    deviation: Tensor
    context_limit = LIMIT

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        n, f, c = config.latents, config.features, config.context
        self.register_buffer("deviation", torch.ones(n))

        def layer(name: str, inputs: int, outputs: int, **options: int) -> TrainableLayer:
            return TrainableLayer(inputs, outputs, input_limit=input_limit(name), **options)

        self.layers = nn.ModuleDict()
        add = self.layers.__setitem__
        add("enter", layer("enter", config.hyper, f, fraction_in=0))
        add("local1", layer("local1", f, f, taps=9))
        add("up1", layer("up1", f, 4 * f))
        add("local2", layer("local2", f, f, taps=9))
        add("up2", layer("up2", f, 4 * f))
        add("first_local", layer("first_local", f, f, taps=9))
        add("first_hidden", layer("first_hidden", 2 * f, c))
        for name in ("second_near", "second_wide"):
            add(name, layer(name, n, n, taps=9, low=-LIMIT))
        add("second_merge", layer("second_merge", f + 3 * n, c))
        add("second_local", layer("second_local", c, c, taps=9))
        add("second_hidden", layer("second_hidden", c, c))
        for step in ("first", "second"):
            limit = _NORMAL_MEAN_LIMIT
            mean = layer("mean", c, n, fraction_out=_NORMAL_MEAN_FRACTION, low=-limit, high=limit)
            level = layer("level", c, n, fraction_out=SCALE_FRACTION, high=SCALE_LEVELS - 1)
            nn.init.normal_(mean.weight, std=1e-3)
            nn.init.normal_(level.weight, std=1e-3)
            add(f"{step}_mean", mean)
            add(f"{step}_level", level)

    def layer(self, name: str) -> TrainableLayer:
        return cast(TrainableLayer, self.layers[name])

    @torch.no_grad()
    def start_from(self, deviation: Tensor, gains: tuple[float, float]) -> None:
        """Set the typical deviations (N,), and the scale biases to what they and the latent gains imply."""
        self.deviation.copy_(deviation)
        for step in ("first", "second"):
            level = self.layer(f"{step}_level")
            for bias, gain in ((level.bias_low, gains[0]), (level.bias_high, gains[1])):
                bias.copy_(scale_to_level(deviation * gain) / 2**SCALE_FRACTION)

    def exact(self, latent_gain: Tensor) -> ExactPrior:
        """The integers of the present parameters. latent_gain: (8, N), the gain of g_a per rate point."""
        positions = torch.linspace(0, 1, RATE_POINTS, device=latent_gain.device)
        unit = (self.deviation * latent_gain).detach()
        return ExactPrior(
            {name: self.layer(name).integers(positions) for name in self.layers},
            Rescale.nearest(unit * 2.0 ** (MEAN_FRACTION - _NORMAL_MEAN_FRACTION), _MEAN_MANTISSA, MEAN_LIMIT),
            Rescale.nearest(2.0 ** (FRACTION - MEAN_FRACTION) / unit, _CONTEXT_MANTISSA, self.context_limit),
        )
