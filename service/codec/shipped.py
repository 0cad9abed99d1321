"""A shipped model: float transforms, the integers of the exact prior, the CDF tables, and what runs on them.

    analyse:     x -> y, z_hat, degradations         device, any precision
    symbols_of:  y, z_hat -> symbols and their rows  device, exact from z_hat and y on
    write:       symbols -> bytes                    CPU, one photo
    read:        bytes -> z_hat, then pass by pass   CPU and device, exact
    synthesise:  y_hat -> x_hat                      device, any precision

All tensors of one call share one latent size; rates may differ within a batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from service.codec.bitstream import Degradation
from service.codec.config import RATE_POINTS, STRIDE, CodecConfig
from service.codec.exact import IntegerLayer
from service.codec.fast import FastStack, speed_up
from service.codec.prior import MEAN_FRACTION, IntegerPrior, Part, PriorOutput, Rescale, parts
from service.codec.rans import (
    SYMBOL_LIMIT,
    CorruptPayload,
    Decoder,
    Encoder,
    GuardedTables,
    Outliers,
    Symbols,
)
from service.codec.refine import Refinement, Rounded, recomputed, steps_of, trust
from service.codec.report import ReportHead
from service.codec.tables import SCALE_LEVELS, Z_LIMIT, CdfTables, level_to_scale
from service.codec.transforms import Analysis, HyperAnalysis, Synthesis, with_weights

_UNIT = 2**MEAN_FRACTION

WIDE, ENOUGH = 16, 1000
"""From this level on, a deviation of 0.8, what rounding changes is as good as uniform in photos, but not in flat or
periodic pictures; and how many such latents can tell."""

COPY, CLOSER, COPY_PIXELS = 0.25, 0.9, 2**23
"""Rounding changes less than this, RMS in steps, where a clean photo came out of g_s (0.17 to 0.24 on four of Kodak),
and the step towards what it came from makes it less by this factor; larger photos are not asked."""

UNDO = 1.2
"""How much of what g_a misses on a copy is made up for: the best of 0.6 to 1.2 over ten generations of two photos."""

GUIDE = 3
"""Index of the least rate point, 4, for whose picture noisy photos are refined: smaller ones' have lost too much."""

T = TypeVar("T")


class OnDevice(Protocol):
    """Runs a function where torch is to run, and returns its result."""

    def __call__(self, work: Callable[[], T], /) -> T: ...


class Watch:
    """Whoever follows the work on a photo; this one does not care."""

    def step(self) -> None:
        """Called after each step of the transforms, in their thread. What it raises ends the work."""

    def more(self, steps: int) -> None:
        """Told where a photo turns out to take so many steps besides: a copy, or one whose latents are refined."""


def _here(work: Callable[[], T]) -> T:
    return work()


@dataclass(frozen=True)
class LatentSymbols:
    """Everything the entropy coder needs of one photo: z, and per pass the symbols and the scale levels, in order."""

    rate: int
    z: Symbols
    passes: tuple[tuple[Symbols, Symbols], ...]


@dataclass(frozen=True)
class Effort:
    """Time for better latents: `rounds` of refinement, 1 to 8, and what they go by, x (B, 3, H, W) and what the report
    found on each photo, as to and from `analyse`."""

    rounds: int
    x: Tensor
    found: Sequence[tuple[Degradation, ...]]


@dataclass(frozen=True)
class Coded:
    """The entropy-coded form of one photo, as the container carries it."""

    payload: bytes
    outliers: bytes


def latent_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of y for a photo of any size."""
    return -(-height // STRIDE), -(-width // STRIDE)


def padded_pixels(height: int, width: int) -> int:
    """Pixels of a photo as the transforms see it: both sides rounded up to multiples of 16."""
    rows, columns = latent_size(height, width)
    return rows * columns * STRIDE**2


def pad_to_stride(x: Tensor) -> Tensor:
    """Repeat the last row and column of x (B, 3, H, W) up to multiples of 16."""
    right, below = -x.shape[3] % STRIDE, -x.shape[2] % STRIDE
    return F.pad(x, (0, right, 0, below), mode="replicate") if right or below else x


class ShippedCodec:
    """One model, ready on one device. Build it with `from_tensors`; `service.store` reads those from a file.

    Args:
        config: the model's shape.
        transforms: g_a, g_s and h_a with their weights.
        prior: the integers of the exact prior.
        deviation: (N,) typical deviations, the normalisation that h_a expects.
        y_tables: a table per scale level. z_tables: a table per rate point and channel, rate-major.
        dtype: of the products in g_a and g_s.
        report: tells what is wrong with a photo; None for a model that has no opinion.

    Attributes:
        steps: of the transforms for one photo, either way.
    """

    def __init__(
        self,
        config: CodecConfig,
        transforms: tuple[Analysis, Synthesis, HyperAnalysis],
        prior: IntegerPrior,
        deviation: Tensor,
        y_tables: CdfTables,
        z_tables: CdfTables,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        report: ReportHead | None = None,
    ) -> None:
        self.config, self.device = config, device
        self.g_a, self.g_s, self.h_a = transforms
        for part in transforms:
            part.to(device).to(memory_format=torch.channels_last)
            part.eval().requires_grad_(False)
        self.recomputed = recomputed(self.g_s, dtype)
        self._refined = Refinement(self.recomputed)
        speed_up(self.g_a, dtype)
        speed_up(self.g_s, dtype)
        self.report = report.to(device).eval().requires_grad_(False) if report else None
        self.prior = prior.on(device)
        self._stacks = [stack for part in (self.g_a, self.g_s) for stack in part.stacks if isinstance(stack, FastStack)]
        self.steps = sum(stack.steps for stack in self._stacks) // 2  # g_s mirrors g_a
        self._watch_with(Watch())
        self.deviation = deviation.to(device)
        self.y_tables = GuardedTables(y_tables)
        hyper = config.hyper
        self.z_tables = [
            GuardedTables(CdfTables(z_tables.cdf[rows], z_tables.size[rows], z_tables.offset[rows]))
            for rows in (slice(rate * hyper, (rate + 1) * hyper) for rate in range(RATE_POINTS))
        ]

    @contextmanager
    def watched_by(self, watch: Watch) -> Iterator[None]:
        """Have it told of every step within. To be entered in the thread that does the work, one at a time."""
        self._watch_with(watch)
        try:
            yield
        finally:
            self._watch_with(Watch())  # what watched may hold on to a photo

    def _watch_with(self, watch: Watch) -> None:
        self._watch = watch
        for stack in self._stacks:
            stack.tell = watch.step

    # --- encoding ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def analyse(self, x: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, list[tuple[Degradation, ...]]]:
        """x: (B, 3, H, W) in [0, 1], multiples of 16; rate: (B,) indexes.

        Returns y (B, N, h, w) float32, z_hat, and per photo what the report finds, nothing where the model has none.
        """
        summaries: list[Tensor] = []
        report = self.report

        def watch(level: int, features: Tensor) -> None:
            if report:
                summaries.append(report.summary(level, features))

        y = self.g_a(x.contiguous(memory_format=torch.channels_last), rate, watch)
        found: list[tuple[Degradation, ...]] = report.findings(summaries) if report else [()] * len(x)
        return y, self._z_hat(y, rate), found

    def _z_hat(self, y: Tensor, rate: Tensor) -> Tensor:
        z: Tensor = self.h_a(y / (self.g_a.gain(rate) * self.deviation[:, None, None]))
        return z.float().round().clamp(-Z_LIMIT, Z_LIMIT)

    @torch.inference_mode()
    def symbols_of(self, y: Tensor, z_hat: Tensor, rate: Tensor, effort: Effort | None = None) -> list[LatentSymbols]:
        """Quantise y; that of a photo which this model wrote at this rate point, as it was quantised then.

        Such a photo is told by latents that lie closer to where the decoder puts them than chance would have it. g_a
        does not quite undo g_s, so copies of copies would fade. What it misses on y is about what it missed on the
        latents of then, and one step makes up for it, towards the y that g_a(g_s(y)) leaves alone (compare Kim et al.,
        "Instability of successive deep image compression", ACM MM 2020). The step is kept where it brings the latents
        closer still. It takes both transforms once more.

        Args: as what `analyse` returned, and `effort` for all other photos without a flaw but noise or JPEG's.
        Returns one per photo.
        """
        latents, rounding = self.rounded(y, z_hat, rate)
        copies = self._copies(y, rate, rounding)
        for index, again in copies.items():
            latents[index] = again
        if effort:
            for index, found in enumerate(effort.found):
                if index not in copies and (share := trust(found)):
                    one = slice(index, index + 1)
                    better = self._refine(y[one], z_hat[one], rate[one], effort.rounds, effort.x[one], share)
                    latents[index] = self.rounded(better, z_hat[one], rate[one])[0][0]
        return latents

    def _copies(self, y: Tensor, rate: Tensor, rounding: list[float]) -> dict[int, LatentSymbols]:
        """Which photos of a batch this model wrote, and how they were quantised then."""
        asked = [index for index, changed in enumerate(rounding) if changed < COPY]
        if not asked or y.shape[2] * y.shape[3] * STRIDE**2 > COPY_PIXELS:
            return {}
        self._watch.more(2 * self.steps)
        y, rate = y[asked], rate[asked]
        y = y + UNDO * (y - self.g_a(self.synthesise(y, rate), rate))
        found = zip(asked, *self.rounded(y, self._z_hat(y, rate), rate))
        return {index: again for index, again, changed in found if changed < CLOSER * rounding[index]}

    def _refine(self, y: Tensor, z_hat: Tensor, rate: Tensor, rounds: int, x: Tensor, share: float) -> Tensor:
        """Latents of one photo that are better to round than y. The photo itself has `share` in what they are for."""
        self._watch.more(steps_of(y.shape[2], y.shape[3], rounds))
        target = x if share == 1 else self._restored(y, rate, x).lerp_(x, share)
        with torch.inference_mode(False), torch.no_grad():
            y, rate, z_hat = (tensor.clone() for tensor in (y, rate, z_hat))
            return self._refined(y, target, rate, rounds, partial(self._maps, z_hat=z_hat, rate=rate), self._watch.step)

    def _restored(self, y: Tensor, rate: Tensor, x: Tensor) -> Tensor:
        """x without its flaws, as well as g_s can tell, at this rate point or at `GUIDE`. y: its latents."""
        guide = rate.clamp(min=GUIDE)
        again = bool(guide != rate)
        self._watch.more(self.steps * (1 + again))
        return self.synthesise(self.g_a(x, guide) if again else y, guide)

    def _maps(self, y: Tensor, z_hat: Tensor, rate: Tensor) -> Rounded:
        """Of one photo, what refinement looks at."""
        h, w = y.shape[-2:]
        means, symbols, levels = (torch.zeros(1, h, w, y.shape[1], device=y.device) for _ in range(3))
        for part, output, chosen, _ in self._passes(y, z_hat, rate):
            for whole, own in ((means, output.mean), (symbols, chosen), (levels, output.level)):
                whole += part.placed(own, h, w)
        means, symbols, levels = (whole.permute(0, 3, 1, 2) for whole in (means, symbols, levels))
        y_hat = (means / _UNIT + symbols).contiguous(memory_format=torch.channels_last)
        return Rounded(y_hat, symbols, level_to_scale(levels), levels > self.config.skipped)

    @torch.inference_mode()
    def rounded(self, y: Tensor, z_hat: Tensor, rate: Tensor) -> tuple[list[LatentSymbols], list[float]]:
        """Quantise y around the exact means, pass by pass.

        Returns:
            The symbols, and what rounding changed, photo by photo: the root mean square over the latents of at least
            `WIDE`, in steps. It is 0.28 to 0.29 for photos that did not come out of g_s, less for flat pictures; NaN
            where too few can tell.
        """
        passes: list[list[tuple[Symbols, Symbols]]] = []
        changed, wide = torch.zeros(2, len(y), device=y.device)
        for _, output, symbols, told in self._passes(y, z_hat, rate):
            changed, wide = changed + told[0], wide + told[1]
            passes.append(_pairs(symbols, output.level))
        zs = [_numpy(z.flatten()) for z in z_hat]
        rounding = (changed / wide).sqrt_().masked_fill_(wide < ENOUGH, math.nan)
        return [LatentSymbols(*each) for each in zip(rate.tolist(), zs, zip(*passes))], rounding.tolist()

    def _passes(
        self, y: Tensor, z_hat: Tensor, rate: Tensor
    ) -> Iterator[tuple[Part, PriorOutput, Tensor, tuple[Tensor, Tensor]]]:
        """Of every pass its latents, what the prior says of them, their symbols, and what `_quantise` tells besides."""
        h, w = y.shape[-2:]
        features = self.prior.features(z_hat, rate, h, w)
        y = y.permute(0, 2, 3, 1)
        known = torch.zeros(y.shape, device=y.device)
        for index, part in enumerate(each := parts(h, w, self.prior.passes, y.device)):
            output = self.prior.predict(index, features, known, rate, part)
            symbols, *told = self._quantise(part.gathered(y), output)
            yield part, output, symbols, (told[0], told[1])
            if part is not each[-1]:
                known += part.placed(output.mean.add_(symbols, alpha=_UNIT), h, w)

    def _quantise(self, y: Tensor, output: PriorOutput) -> tuple[Tensor, Tensor, Tensor]:
        """y: (B, n). Returns the symbols, and of the wide latents the sum of squared changes and how many they are."""
        offset = y.sub(output.mean, alpha=1 / _UNIT)
        symbols = offset.round()
        wide = output.level >= WIDE
        changed = offset.sub_(symbols).square_().mul_(wide).sum(1)
        symbols.clamp_(-SYMBOL_LIMIT, SYMBOL_LIMIT).masked_fill_(output.level <= self.config.skipped, 0)
        return symbols, changed, wide.sum(1)

    def write(self, latents: LatentSymbols) -> Coded:
        """Entropy-code one photo."""
        coded = [levels > self.config.skipped for _, levels in latents.passes]
        symbols, levels = (
            np.concatenate([one[chosen] for one, chosen in zip(each, coded)]) for each in zip(*latents.passes)
        )
        clipped = self.y_tables.clip(symbols, levels)
        encoder = Encoder()
        encoder.add(latents.z, self.z_channels(len(latents.z)), self.z_tables[latents.rate])
        encoder.add(clipped, levels, self.y_tables)
        return Coded(encoder.finish(), Outliers.between(symbols, clipped).to_bytes())

    def z_channels(self, count: int) -> Symbols:
        """The channel of each of so many symbols of z, in coding order."""
        return np.repeat(np.arange(self.config.hyper, dtype=np.int32), count // self.config.hyper)

    # --- decoding ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def read(self, coded: Sequence[Coded], rate: Tensor, h: int, w: int, on_device: OnDevice = _here) -> Tensor:
        """Decode streams of one latent size (h, w) to y_hat (B, N, h, w) float32.

        `on_device` runs the steps that are torch; by default they run here. Between them the entropy coder works here.

        Raises:
            CorruptPayload: the outliers of a stream contradict it, or a part of it is longer than its photo can need.
                Any other payload bytes decode to some picture.
        """
        n, hyper = self.config.latents, self.config.hyper
        zh, zw = -(-h // 4), -(-w // 4)
        decoders = [Decoder(one.payload, hyper * zh * zw + n * h * w) for one in coded]
        outliers = [Outliers.from_bytes(one.outliers, n * h * w) for one in coded]
        channels = self.z_channels(hyper * zh * zw)
        z = [decoder.take(channels, self.z_tables[index]) for decoder, index in zip(decoders, rate.tolist())]
        starts = [0] * len(coded)

        def decode(levels: list[Symbols]) -> list[Symbols]:
            """The symbols of one pass; moves `starts` on."""
            symbols = [np.zeros(len(one), np.int32) for one in levels]
            for index, (decoder, listed) in enumerate(zip(decoders, outliers)):
                wanted = levels[index] > self.config.skipped
                taken = decoder.take(levels[index][wanted], self.y_tables)
                symbols[index][wanted] = listed.within(starts[index], len(taken)).apply(taken)
                starts[index] += len(taken)
            return symbols

        def start() -> tuple[Tensor, Tensor, tuple[Part, ...]]:
            z_hat = torch.from_numpy(np.stack(z).reshape(-1, hyper, zh, zw)).to(self.device, torch.float32)
            y_hat = torch.zeros(len(coded), h, w, n, device=self.device)
            return self.prior.features(z_hat, rate, h, w), y_hat, parts(h, w, self.prior.passes, self.device)

        def told(index: int, part: Part) -> tuple[Tensor, list[Symbols]]:
            output = self.prior.predict(index, features, y_hat, rate, part)
            return output.mean, [_numpy(level) for level in output.level]

        def place(part: Part, mean: Tensor, symbols: Symbols) -> None:
            steps = torch.from_numpy(symbols).to(self.device, torch.float32)
            y_hat.add_(part.placed(steps.mul_(_UNIT).add_(mean), h, w))

        features, y_hat, each = on_device(start)
        for index, part in enumerate(each):
            mean, levels = on_device(partial(told, index, part))
            on_device(partial(place, part, mean, np.stack(decode(levels))))
            del mean, levels  # much for a large photo
        for count, listed in zip(starts, outliers):
            if len(listed.position) and listed.position[-1] >= count:
                raise CorruptPayload(f"outliers: position {listed.position[-1]} of {count} coded latents")
        return on_device(lambda: y_hat.div_(_UNIT).permute(0, 3, 1, 2))

    @torch.inference_mode()
    def synthesise(self, y_hat: Tensor, rate: Tensor) -> Tensor:
        """y_hat: (B, N, h, w). Returns x_hat (B, 3, 16 h, 16 w) float32 in [0, 1]."""
        return self.g_s(y_hat.contiguous(memory_format=torch.channels_last), rate).float().clamp_(0, 1)

    # --- tensors ----------------------------------------------------------------------------------------------------

    @classmethod
    @torch.inference_mode(False)  # gradients of what was made in it are not to be had
    def from_tensors(
        cls, tensors: dict[str, Tensor], description: str, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> ShippedCodec:
        """Build a codec from what `ship` returned.

        Raises:
            ValueError: the tensors do not fit the description, one is not finite, or a layer or a rescale cannot be
                exact on any carrier.
        """
        for name, value in tensors.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"expected finite weights, {name} has others")
        try:
            stated = json.loads(description)
            config = CodecConfig.from_dict(stated["config"])
            transforms = (
                with_weights(lambda: Analysis(config), _below(tensors, "g_a")),
                with_weights(lambda: Synthesis(config), _below(tensors, "g_s")),
                with_weights(lambda: HyperAnalysis(config), _below(tensors, "h_a")),
            )
            layers = {
                name: IntegerLayer(
                    tensors[f"prior.{name}.weight"],
                    tensors[f"prior.{name}.bias"],
                    tensors[f"prior.{name}.shift"],
                    *clamp,
                )
                for name, clamp in stated["clamps"].items()
            }
            mean, context = (
                Rescale(tensors[f"rescale.{name}.factor"], tensors[f"rescale.{name}.shift"], stated["limits"][name])
                for name in ("mean", "context")
            )
            y_tables, z_tables = (CdfTables.from_tensors(tensors, name) for name in "yz")
            if len(y_tables.cdf) != SCALE_LEVELS or not y_tables.within(SYMBOL_LIMIT):
                raise ValueError(f"expected {SCALE_LEVELS} tables for y, of symbols within +-{SYMBOL_LIMIT}")
            if len(z_tables.cdf) != RATE_POINTS * config.hyper or not z_tables.within(Z_LIMIT):
                raise ValueError(f"expected {RATE_POINTS * config.hyper} tables for z, of symbols within +-{Z_LIMIT}")
            prior = IntegerPrior(config.passes, layers, mean, context)
            weights = _below(tensors, "report")
            report = with_weights(lambda: ReportHead(config), weights) if weights else None
            deviation = tensors["deviation"]
            if deviation.shape != (config.latents,) or not (deviation > 0).all():
                raise ValueError(f"expected a deviation for each of {config.latents} latents")
            return cls(config, transforms, prior, deviation, y_tables, z_tables, device, dtype, report)
        except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise ValueError(f"expected the tensors of a shipped codec: {error}") from error


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Copies of a part's weights, in float32: files keep them in fewer bits."""
    below = {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + ".")}
    return {name: value.to(torch.float32, copy=True) for name, value in below.items()}


def _pairs(symbols: Tensor, levels: Tensor) -> list[tuple[Symbols, Symbols]]:
    """Both (B, n). Returns them photo by photo."""
    return [(_numpy(one), _numpy(level)) for one, level in zip(symbols, levels)]


def _numpy(x: Tensor) -> Symbols:
    return x.to("cpu", torch.int32).numpy()
