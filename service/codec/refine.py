"""Refinement: a better choice of the integers that a photo is coded as, for time. Decoders and bitstreams know nothing
of it.

Rounding takes each latent for itself, and g_a gives for all photos what is best for this one only nearly. A round asks
g_s, by the gradient of lambda D + R, what a step of every latent would save and cost, and takes the best two steps at
every position: more at once would stand in each other's way (compare Campos et al., "Content adaptive optimization for
neural image compression", CVPR Workshops 2019, which descends on y for thousands of steps).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from service.codec.bitstream import Degradation, DegradationKind
from service.codec.config import STRIDE
from service.codec.model import gaussian_bits
from service.codec.report import HARMLESS, SPAN
from service.codec.transforms import BlockStack, Synthesis, rate_lambda

Block = Callable[[Tensor], Tensor]

_STEPS = 2
"""Latents that move at one position in one round, at most."""

_CARE, _BOLDER, _WARIER = 2.0, 0.75, 2.0
"""By how much what a step costs by itself in distortion counts against what the gradient promises, since it is not
alone, and what becomes of that after a round that made things better or worse (as in Levenberg's and Marquardt's
method). Of 1 to 2.5, 0.6 to 1 and 1.5 to 2, by crops of six photos of Kodak, clean and noisy, rate points 1 to 8."""

GUIDE = 3
"""Index of the least rate point whose picture noisy photos are refined for: smaller ones' have lost too much."""

_WINDOW, _MARGIN = 48, 4
"""Positions that go through g_s together, in each direction, and those around them that it sees besides."""

_GRAIN = 20 / 255
"""Deviation of the error at which a photo is as good a guide to the clean one as what g_s makes of it."""


@dataclass(frozen=True)
class Rounded:
    """y_hat, the integers in it, the deviations that the prior expects, and whether it is coded, all (1, N, h, w)."""

    y_hat: Tensor
    symbols: Tensor
    scale: Tensor
    coded: Tensor

    @cached_property
    def bits(self) -> Tensor:
        """Of every latent, if it is coded."""
        return gaussian_bits(self.symbols, self.scale)


def trust(found: tuple[Degradation, ...]) -> float:
    """How far the photo itself, rather than what g_s makes of it, tells what it should look like, from the report.

    1 for a clean photo, less the more noise or damage by JPEG it has, 0 for one with any other flaw, or no report.
    """
    if [one.kind for one in found] == [DegradationKind.CLEAN]:
        return 1.0
    if not found or {one.kind for one in found} - {DegradationKind.NOISE, DegradationKind.JPEG}:
        return 0.0
    variance = sum(10 ** ((SPAN * one.strength - HARMLESS) / 10) for one in found)
    return 1 / (1 + variance / _GRAIN**2)


class _Recompute(torch.autograd.Function):
    """A block that keeps its input for the way back and nothing else: a third more time, two fifths of the memory.

    (`torch.utils.checkpoint` does the same, but imports the compiler: 1.4 s and 150 MB.)
    """

    @staticmethod
    def forward(ctx, x: Tensor, block: Block) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            result = ctx.block(x)
        return *torch.autograd.grad(result, x, grad), None


class _Recomputed(nn.Module):
    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.dtype = block, dtype

    def forward(self, x: Tensor) -> Tensor:
        """The shape of x."""
        result: Tensor = _Recompute.apply(x, self._run)
        return result

    def _run(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            result: Tensor = self.block(x)
        return result


def recomputed(g_s: Synthesis, dtype: torch.dtype) -> Synthesis:
    """A synthesis through which gradients find their way back in little memory, with the weights of `g_s` itself."""
    with torch.device("meta"):
        twin = Synthesis(g_s.config)
    twin.load_state_dict(g_s.state_dict(), assign=True)
    twin.eval().requires_grad_(False)
    for stack in twin.stacks:
        if isinstance(stack, BlockStack):
            stack.blocks = nn.Sequential(*(_Recomputed(block, dtype) for block in stack.blocks))
    return twin


class Refinement:
    """Of one model's latents. `g_s` takes y_hat and rate and gives x_hat, with gradients, as `recomputed` ones do."""

    def __init__(self, g_s: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._g_s = g_s

    def __call__(
        self,
        y: Tensor,
        target: Tensor,
        rate: Tensor,
        rounds: int,
        rounded: Callable[[Tensor], Rounded],
        tell: Callable[[], None],
    ) -> Tensor:
        """What to round in place of y.

        Args:
            y: (1, N, h, w) of a photo. target: (1, 3, 16 h, 16 w), what it should be restored to.
            rate: (1,) index. rounds: 1 to `MOST_EFFORT`.
            rounded: gives what y rounds to. tell: called after each of the `steps_of` it.

        Returns:
            Latents of which lambda D + R is least, which may be y.
        """
        weight = float(rate_lambda(rate)) * target[0, 0].numel()
        curvature, care = torch.zeros(()), _CARE / _BOLDER
        best, least = y, math.inf
        for turn in range(rounds + 1):
            now = rounded(y)
            last = turn == rounds
            distortion, gradient, probed = self._look(now.y_hat, target, rate, not last, turn == 0, tell)
            if turn == 0:
                curvature = weight * probed
            if (cost := weight * distortion + float((now.bits * now.coded).sum())) < least:
                best, least, known, slope, care = y, cost, now, weight * gradient, care * _BOLDER
            else:
                care *= _WARIER  # and again from the best
            y = _stepped(best, known, slope, care * curvature)
        return best

    def _look(
        self, y_hat: Tensor, target: Tensor, rate: Tensor, slope: bool, probe: bool, tell: Callable[[], None]
    ) -> tuple[float, Tensor, Tensor]:
        """D, the mean squared error; its gradient with respect to y_hat; and with a probe, half its mean curvature in
        every channel (1, N, 1, 1)."""
        h, w = y_hat.shape[-2:]
        squares, probed = 0.0, torch.zeros((), device=y_hat.device)
        gradient = torch.zeros_like(y_hat)
        for rows in _windows(h):
            for columns in _windows(w):
                seen = y_hat[..., rows.seen, columns.seen].clone().requires_grad_(slope)
                wanted = target[..., _pixels(rows.seen), _pixels(columns.seen)]
                with torch.set_grad_enabled(slope):
                    error = self._g_s(seen, rate).clamp(0, 1) - wanted  # as the decoder clips it
                squares += float(error.detach()[..., _pixels(rows.inner), _pixels(columns.inner)].square().sum())
                if probe:
                    # Hutchinson's estimate: random signs, sent back through g_s, square to the diagonal of J^T J.
                    signs = torch.empty_like(error).bernoulli_(0.5, generator=_generator(error.device)).mul_(2).sub_(1)
                    (back,) = torch.autograd.grad(error, seen, signs, retain_graph=True)
                    probed = probed + back.square().sum((2, 3), keepdim=True) * (rows.share * columns.share)
                if slope:
                    (own,) = torch.autograd.grad(error, seen, error.detach())
                    gradient[..., rows.inner, columns.inner] = own[..., rows.within, columns.within]
                tell()
        count = target.numel()
        return squares / count, gradient * (2 / count), probed / (h * w * count)


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _stepped(y: Tensor, now: Rounded, gradient: Tensor, curvature: Tensor) -> Tensor:
    """y, with the steps that save most put in place of what they step from."""
    step = -gradient.sign()
    bits = gaussian_bits(now.symbols + step, now.scale) - now.bits
    saved = (gradient.abs() - curvature - bits).masked_fill(~now.coded, 0)
    least = saved.topk(_STEPS, 1).values[:, -1:]
    return torch.where((saved > 0) & (saved >= least), now.y_hat + step, y)


def steps_of(h: int, w: int, rounds: int) -> int:
    """Of so many rounds for a photo whose latents are (h, w); they take about equally long, but for the last ones."""
    return (rounds + 1) * len(_windows(h)) * len(_windows(w))


@dataclass(frozen=True)
class _Window:
    """Along one direction: positions that g_s sees, those that count, and where they lie within the first."""

    seen: slice
    inner: slice

    @property
    def within(self) -> slice:
        return slice(self.inner.start - self.seen.start, self.inner.stop - self.seen.start)

    @property
    def share(self) -> float:
        """Of what is seen, what counts."""
        return (self.inner.stop - self.inner.start) / (self.seen.stop - self.seen.start)


def _windows(length: int) -> list[_Window]:
    """About equal ones that cover so many positions; one for a photo that is not large."""
    count = math.ceil(length / _WINDOW)
    edges = [length * index // count for index in range(count + 1)]
    return [
        _Window(slice(max(0, start - _MARGIN), min(length, end + _MARGIN)), slice(start, end))
        for start, end in pairwise(edges)
    ]


def _pixels(positions: slice) -> slice:
    return slice(positions.start * STRIDE, positions.stop * STRIDE)
