"""The exact prior: from z_hat to the mean and the scale index of every latent, in integers only.

    z_hat -> h_s -> features -> pass 0 -> mu, scale index of the first part of the latents
                        |                       | y_hat of that part
                        +------> pass 1 <-------+    -> mu, scale index of the second, and so on

With two passes the parts are a checkerboard over row, column and channel, so that in the second pass every latent has
its four neighbours and the channels beside it (the dual spatial prior of DCVC-HEM / DCVC-FM). With four, the four
positions of every 2x2 square take turns, each group of channels in an order of its own (the quadtree of DCVC-DC): the
last three quarters have more and more around them. No latent waits for another of its own pass.

`PriorNet` holds the float parameters that are trained, `IntegerPrior` the integers that ship, `ExactPrior` is the
arithmetic. Training runs the very same arithmetic on integers derived from the parameters. All of it runs on
(B, h, w, channels), and each pass speaks of its part of the latents only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from service.codec.config import RATE_POINTS, CodecConfig
from service.codec.exact import (
    FLOAT32_EXACT,
    FLOAT64_EXACT,
    FRACTION,
    LIMIT,
    MOST_SHIFT,
    IntegerLayer,
    ScaledLayer,
    TrainableLayer,
    check_integers,
    depthwise,
    pointwise,
    power_of_two,
    requantise,
    ste_clamp,
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
class Part:
    """The latents of one of P passes, h w N / P of each photo. In coding order they go by channel, row, column.

    Attributes:
        at: for each of P groups of channels, every P-th from its own first one on: indexes into the h*w positions,
            where these channels belong to this part.
    """

    at: tuple[Tensor, ...]

    def gathered(self, y: Tensor) -> Tensor:
        """y: (B, h, w, N). Returns (B, n), this part's in coding order."""
        flat, groups = y.flatten(1, 2), len(self.at)
        return _in_order([flat.index_select(1, at)[..., group::groups] for group, at in enumerate(self.at)])

    def placed(self, values: Tensor, h: int, w: int) -> Tensor:
        """values: (B, n) in coding order. Returns (B, h, w, N), zero where other parts are."""
        b = len(values)
        groups = torch.split(values.view(b, -1, h * w).transpose(1, 2), [len(at) for at in self.at], 1)
        out = values.new_zeros(b, h * w, groups[0].shape[2], len(groups))
        for group, (at, placed) in enumerate(zip(self.at, groups)):
            out[:, at, :, group] = placed
        return out.view(b, h, w, -1)


def _in_order(groups: list[Tensor]) -> Tensor:
    """The values of every group of channels, (B, positions, N / P), as (B, n) in coding order."""
    return torch.cat(groups, 1).transpose(1, 2).flatten(1)


_TURNS = {2: (0, 1), 4: (0, 3, 1, 2)}
"""By the number of passes: which cell of the first group takes its turn in each; those of the others are flipped.
Diagonal neighbours follow one another: the first two of four passes speak of what the first of two speaks of."""


def parts(h: int, w: int, passes: int, device: torch.device) -> tuple[Part, ...]:
    """The latents of every pass."""
    i, j = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)
    cell = ((i + j) % 2 if passes == 2 else 2 * (i % 2) + j % 2).flatten()
    where = [(cell == number).nonzero()[:, 0] for number in range(passes)]
    # A Gray code, whose last bit changes from group to group as the checkerboard's colour does.
    flips = [group ^ group >> 1 for group in range(passes)]
    return tuple(Part(tuple(where[turn ^ flip] for flip in flips)) for turn in _TURNS[passes])


@dataclass(frozen=True)
class PriorOutput:
    """What a pass says of its part: `mean` in sixteenths and `level`, 0 to 63, both (B, n) in coding order."""

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

    def scaled(self, device: torch.device) -> ScaledRescale:
        factor, shift = self.factor.to(device, torch.float32), self.shift.to(device, torch.float32)
        return ScaledRescale(factor * power_of_two(-shift), self.limit)

    @classmethod
    def nearest(cls, value: Tensor, mantissa: int, limit: int) -> Rescale:
        """The integers closest to multiplying by `value` (8, C), with factors up to `mantissa`."""
        shift = (mantissa / value).log2().floor().clamp(0, MOST_SHIFT)
        return cls((value * power_of_two(shift)).round().clamp(1, mantissa), shift, limit)


@dataclass(frozen=True)
class ScaledRescale:
    """A `Rescale` ready to run: `factor` (8, C) times 2^-shift, which loses nothing.

    The product is exact, and the half that rounds is one IEEE addition to it: every device rounds that alike, a fused
    multiply-add too.
    """

    factor: Tensor
    limit: int

    def __call__(self, x: Tensor, rate: Tensor) -> Tensor:
        """x: (B, ..., C) integers."""
        factor = self.factor[rate].view(len(rate), *(1,) * (x.ndim - 2), -1)
        return requantise(x * factor + 0.5, -self.limit, self.limit)

    def outputs(self, first: int, step: int) -> ScaledRescale:
        """Every `step`-th channel from `first` on."""
        return ScaledRescale(self.factor[:, first::step].contiguous(), self.limit)


@dataclass(frozen=True)
class IntegerPrior:
    """The integers of a prior of two or four passes, as the store holds them."""

    passes: int
    layers: dict[str, IntegerLayer]
    mean_rescale: Rescale
    context_rescale: Rescale

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> ExactPrior:
        """Ready to run on a device.

        Args:
            dtype: carrier of every layer; None takes for each the narrowest that is exact for it. Layers that are being
                trained are exact in float32 (`TrainableLayer` says how far).

        Raises:
            ValueError: layers are missing or too many, one holds no integers, or could leave float64's exact range or
                its outputs' bounds, or a rescale float32's range.
        """
        if dtype is None:
            self._check()
        layers = {name: layer.scaled(device, dtype or carrier(name, layer)) for name, layer in self.layers.items()}
        groups = range(self.passes)
        outputs = {name: tuple(layers[name].outputs(g, self.passes) for g in groups) for name in OUTPUTS}
        inner = {name: layer for name, layer in layers.items() if name not in OUTPUTS}
        mean = self.mean_rescale.scaled(device)
        rescales = tuple(mean.outputs(g, self.passes) for g in groups)
        return ExactPrior(self.passes, inner, outputs, rescales, self.context_rescale.scaled(device))

    def _check(self) -> None:
        if self.layers.keys() != (wanted := layer_names(self.passes)):
            raise ValueError(f"{self.passes} passes do not go with layers {sorted(self.layers.keys() ^ wanted)}")
        for name, layer in self.layers.items():
            layer.check(name)
            low, high = -LIMIT, LIMIT
            if name in OUTPUTS:
                low, high = (0, SCALE_LEVELS - 1) if name.endswith("level") else (-MEAN_LIMIT, MEAN_LIMIT)
            if not low <= layer.low <= layer.high <= high:
                raise ValueError(f"layer {name}: expected outputs within {low} and {high}")
        if not (0 <= self.context_rescale.limit <= LIMIT and 0 <= self.mean_rescale.limit <= MEAN_LIMIT):
            raise ValueError(f"expected limits of the rescales up to {MEAN_LIMIT} (mean) and {LIMIT} (context)")
        means = [self.layers[name] for name in OUTPUTS if name.endswith("mean")]
        normal = max(max(abs(layer.low), abs(layer.high)) for layer in means)
        for rescale, reach in ((self.mean_rescale, normal), (self.context_rescale, MEAN_LIMIT)):
            check_integers("the integers for rescales", rescale.shift, rescale.factor)
            if (product := reach * float(rescale.factor.double().abs().max())) >= FLOAT32_EXACT:
                raise ValueError(f"products up to {product:.3g} leave the exact range of float32 (2^24)")


@dataclass(frozen=True)
class ExactPrior:
    """The arithmetic of a prior. `rate` is always (B,) int64, indexes 0..7.

    Attributes:
        layers: those that run at every position.
        outputs: the last ones of each pass, by the group of channels that they speak of.
        mean_rescale: likewise. context_rescale: of y_hat, before a later pass sees it.
    """

    passes: int
    layers: dict[str, ScaledLayer]
    outputs: dict[str, tuple[ScaledLayer, ...]]
    mean_rescale: tuple[ScaledRescale, ...]
    context_rescale: ScaledRescale

    def tensors(self) -> list[Tensor]:
        """All that it holds on its device."""
        layers = [*self.layers.values(), *(layer for groups in self.outputs.values() for layer in groups)]
        rescales = [*self.mean_rescale, self.context_rescale]
        return [part for layer in layers for part in (layer.weight, layer.bias)] + [one.factor for one in rescales]

    def _run(self, kind: Callable[[Tensor, ScaledLayer, Tensor], Tensor], name: str, x: Tensor, rate: Tensor) -> Tensor:
        return _carried(kind, self.layers[name], x, rate)

    def features(self, z_hat: Tensor, rate: Tensor, h: int, w: int) -> Tensor:
        """h_s: z_hat (B, hyper, ceil(h/4), ceil(w/4)) integers -> features (B, h, w, F) integers."""
        x = self._run(pointwise, "enter", z_hat.permute(0, 2, 3, 1), rate)
        x = _shuffled(self._run(pointwise, "up1", x + self._run(depthwise, "local1", x, rate), rate))
        x = _shuffled(self._run(pointwise, "up2", x + self._run(depthwise, "local2", x, rate), rate))
        return x[:, :h, :w].contiguous()

    def predict(self, index: int, features: Tensor, y_hat: Tensor, rate: Tensor, part: Part) -> PriorOutput:
        """What pass `index` says of a part of the latents.

        y_hat: (B, h, w, N) in sixteenths, zero where no pass before has spoken; pass 0 does not look at it.
        """
        step = ORDINALS[index]
        if index == 0:
            x = self._run(depthwise, "first_local", features, rate)
            x = self._run(pointwise, "first_hidden", torch.cat([features, x], -1), rate)
        else:
            known = self.context_rescale(ste_clamp(y_hat, -MEAN_LIMIT, MEAN_LIMIT), rate)
            near = self._run(depthwise, f"{step}_near", known, rate)
            wide = self._run(depthwise, f"{step}_wide", known, rate)
            x = self._run(pointwise, f"{step}_merge", torch.cat([features, known, near, wide], -1), rate)
            x = x + self._run(depthwise, f"{step}_local", x, rate)
            x = self._run(pointwise, f"{step}_hidden", x, rate)
        return self._output("second" if index else "first", x, rate, part)

    def _output(self, step: str, x: Tensor, rate: Tensor, part: Part) -> PriorOutput:
        x = x.flatten(1, 2)
        means, levels = [], []
        for group, at in enumerate(part.at):
            mean, level = (self.outputs[f"{step}_{name}"][group] for name in ("mean", "level"))
            seen = x.index_select(1, at)
            means.append(self.mean_rescale[group](_carried(pointwise, mean, seen, rate), rate))
            levels.append(_carried(pointwise, level, seen, rate))
        return PriorOutput(_in_order(means), _in_order(levels))


def _carried(
    kind: Callable[[Tensor, ScaledLayer, Tensor], Tensor], layer: ScaledLayer, x: Tensor, rate: Tensor
) -> Tensor:
    """A layer in its carrier; float32 in and out."""
    return kind(x.to(layer.weight.dtype), layer, rate).to(torch.float32)


def _shuffled(x: Tensor) -> Tensor:
    """A pixel shuffle by 2 of (B, h, w, 4 C) to (B, 2 h, 2 w, C)."""
    b, h, w, c = x.shape
    return x.view(b, h, w, c // 4, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)


ORDINALS = ("first", "second", "third", "fourth")
OUTPUTS = ("first_mean", "first_level", "second_mean", "second_level")
"""The last layers; those of the second pass serve all later ones."""
_SUMS = {"up1", "up2", *(f"{step}_hidden" for step in ORDINALS[1:])}
"""Layers whose input is a sum of two activations and so reaches twice the limit."""


def layer_names(passes: int) -> set[str]:
    """Of all layers of a prior."""
    later = {f"{step}_{part}" for step in ORDINALS[1:passes] for part in ("near", "wide", "merge", "local", "hidden")}
    return {"enter", "local1", "up1", "local2", "up2", "first_local", "first_hidden", *later, *OUTPUTS}


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
    denormalise the mean follow it and the latent gains of g_a. With a `context_limit` of 0, no pass sees anything of
    those before.
    """

    deviation: Tensor
    context_limit = LIMIT

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        n, f, c, self.passes = config.latents, config.features, config.context, config.passes
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
        for step in ORDINALS[1 : self.passes]:
            for name in (f"{step}_near", f"{step}_wide"):
                add(name, layer(name, n, n, taps=9, low=-LIMIT))
            add(f"{step}_merge", layer(f"{step}_merge", f + 3 * n, c))
            add(f"{step}_local", layer(f"{step}_local", c, c, taps=9))
            add(f"{step}_hidden", layer(f"{step}_hidden", c, c))
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

    def integers(self, latent_gain: Tensor) -> IntegerPrior:
        """The integers of the present parameters. latent_gain: (8, N), the gain of g_a per rate point."""
        positions = torch.linspace(0, 1, RATE_POINTS, device=latent_gain.device)
        unit = (self.deviation * latent_gain).detach()
        return IntegerPrior(
            self.passes,
            {name: self.layer(name).integers(positions) for name in self.layers},
            Rescale.nearest(unit * 2.0 ** (MEAN_FRACTION - _NORMAL_MEAN_FRACTION), _MEAN_MANTISSA, MEAN_LIMIT),
            Rescale.nearest(2.0 ** (FRACTION - MEAN_FRACTION) / unit, _CONTEXT_MANTISSA, self.context_limit),
        )
