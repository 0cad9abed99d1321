"""Refinement: a better choice of the integers that a photo is coded as, for time. Decoders and bitstreams know nothing
of it.

Rounding takes each latent for itself, and g_a gives for all photos what is best for this one only nearly. A round asks
g_s, by the gradient of lambda D + R, what a step of every latent would save and cost, and takes the best two steps at
every position: more at once would stand in each other's way (compare Campos et al., "Content adaptive optimization for
neural image compression", CVPR Workshops 2019, which descends on y for thousands of steps).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from service.codec.bitstream import Degradation, DegradationKind
from service.codec.config import STRIDE
from service.codec.model import gaussian_bits
from service.codec.report import HARMLESS, SPAN
from service.codec.transforms import BlockStack, Synthesis, rate_lambda

Whole = TypeVar("Whole", bound=nn.Module)

Block = Callable[[Tensor], Tensor]

_STEPS = 2
"""Latents that move at one position in one round, at most."""

_CARE, _BOLDER, _WARIER = 2.0, 0.75, 2.0
"""By how much what a step costs by itself in distortion counts against what the gradient promises, since it is not
alone, and what becomes of that after a round that made things better or worse (as in Levenberg's and Marquardt's
method). Of 1 to 2.5, 0.6 to 1 and 1.5 and 2, by crops of six photos of Kodak, clean and noisy, rate points 1 to 8."""

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

    @property
    def total(self) -> float:
        """Bits of all that is coded."""
        return float((self.bits * self.coded).sum())


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


def _sent_back(grad: Tensor, result: Tensor, x: Tensor, keep: bool = False) -> Tensor:
    """What a gradient of `result` says of x; the graph stays for another if `keep`.

    (A gradient that is handed to `torch.autograd.grad` makes it import an algebra system: half a second.)
    """
    with torch.enable_grad():
        return torch.autograd.grad((result * grad).sum(), x, retain_graph=keep)[0]


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
        return _sent_back(grad, result, x), None


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


def _with_child(module: Whole, name: str, child: nn.Module) -> Whole:
    """A module that is `module`, parameters and all, but for one child."""
    other = copy.copy(module)
    other._modules = {**module._modules, name: child}
    return other


def recomputed(g_s: Synthesis, dtype: torch.dtype) -> Synthesis:
    """A synthesis through which gradients find their way back in little memory, with the weights of `g_s` itself."""
    stacks = [
        _with_child(stack, "blocks", nn.Sequential(*(_Recomputed(block, dtype) for block in stack.blocks)))
        for stack in g_s.stacks
        if isinstance(stack, BlockStack)
    ]
    return _with_child(g_s, "stacks", nn.ModuleList(stacks))


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
            Of the latents that were tried, those of which lambda D + R is least; it may be y.
        """
        weight = float(rate_lambda(rate)) * target[0, 0].numel()
        best, care = y, _CARE
        seen = rounded(best)
        distortion, gradient, curvature = self._look(seen, target, rate, tell, probe=True)
        least = weight * distortion + seen.total
        for left in reversed(range(rounds)):
            tried = _stepped(best, seen, gradient.mul(weight), curvature * (weight * care))
            if tried is best:  # nor would any later round move
                for _ in range(steps_of(y.shape[2], y.shape[3], left)):
                    tell()
                break
            now = rounded(tried)
            distortion, slope, _ = self._look(now, target, rate, tell, sloping=left > 0)
            if (cost := weight * distortion + now.total) < least:
                best, seen, gradient, least, care = tried, now, slope, cost, care * _BOLDER
            else:
                care *= _WARIER  # and again from the best
            del now, slope, tried  # a large photo has no memory to spare
        return best

    def _look(
        self,
        at: Rounded,
        target: Tensor,
        rate: Tensor,
        tell: Callable[[], None],
        *,
        sloping: bool = True,
        probe: bool = False,
    ) -> tuple[float, Tensor, Tensor]:
        """D, the mean squared error; where `sloping`, its gradient with respect to y_hat; and with a probe, half its
        mean curvature in every channel (1, N, 1, 1)."""
        h, w = at.y_hat.shape[-2:]
        squares, probed = 0.0, torch.zeros((), device=at.y_hat.device)
        gradient = torch.zeros_like(at.y_hat) if sloping else probed
        for rows in _windows(h):
            for columns in _windows(w):
                y_hat = at.y_hat[..., rows.seen, columns.seen].clone().requires_grad_(sloping)
                wanted = target[..., _pixels(rows.seen), _pixels(columns.seen)]
                with torch.set_grad_enabled(sloping):
                    error = self._g_s(y_hat, rate).clamp(0, 1) - wanted  # as the decoder clips it
                squares += float(error.detach()[..., _pixels(rows.within), _pixels(columns.within)].square().sum())
                if probe:
                    # Hutchinson's estimate: random signs, sent back through g_s, square to the diagonal of J^T J.
                    signs = torch.empty_like(error).bernoulli_(0.5, generator=_generator(error.device)).mul_(2).sub_(1)
                    back = _sent_back(signs, error, y_hat, keep=True)
                    probed = probed + back.square().sum((2, 3), keepdim=True) * (rows.share * columns.share)
                if sloping:
                    own = _sent_back(error.detach(), error, y_hat)
                    gradient[..., rows.inner, columns.inner] = own[..., rows.within, columns.within]
                tell()
        count = target.numel()
        return squares / count, gradient.mul_(2 / count), probed / (h * w * count)


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _stepped(y: Tensor, now: Rounded, gradient: Tensor, curvature: Tensor) -> Tensor:
    """y, with the steps that save most put in place of what they step from; y itself where none saves anything."""
    step = -gradient.sign()
    bits = gaussian_bits(now.symbols + step, now.scale) - now.bits
    saved = (gradient.abs() - curvature - bits).masked_fill(~now.coded, 0)
    taken = (saved > 0) & (saved >= saved.topk(_STEPS, 1).values[:, -1:])
    return torch.where(taken, now.y_hat + step, y) if taken.any() else y


def steps_of(h: int, w: int, rounds: int) -> int:
    """Of so many rounds for a photo whose latents are (h, w); the first take somewhat longer, the last less."""
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
