"""Integer layers carried in float tensors: the arithmetic of the exact path.

Every value here is an integer, or one over a power of two that all summands of a sum share; every partial sum stays
below the carrier's exact range, and so no order of summation, batch size, thread count, device or library version can
change a result. The same functions serve training: there the integers are derived from float parameters by
straight-through rounding, so that training sees the final arithmetic.

    IntegerLayer  what the store holds: weights, biases and the right shift behind them
    ScaledLayer   the same, multiplied through by 2^-shift, in its carrier: ready to run

Activations are fixed point with `FRACTION` fractional bits unless a layer says otherwise, within +-`LIMIT`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FRACTION = 6
LIMIT = 1023  # 11 significant bits: also exact as a TF32 operand
WEIGHT_LIMIT = 127
MOST_SHIFT = 30
FLOAT32_EXACT = 2**24
FLOAT64_EXACT = 2**53


class _SteClamp(torch.autograd.Function):
    """Clamp whose gradient also flows outside the range when it leads back inside, so that nothing stays stuck."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        blocked = ((x < ctx.low) & (grad > 0)) | ((x > ctx.high) & (grad < 0))
        return grad.masked_fill(blocked, 0), None, None


def ste_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp to [low, high]; in training a gradient that leads back inside passes."""
    return _SteClamp.apply(x, low, high) if torch.is_grad_enabled() else x.clamp(low, high)


def ste_floor(x: Tensor) -> Tensor:
    """Floor, with the gradient of the identity in training."""
    return x + (x.floor() - x).detach() if torch.is_grad_enabled() and x.requires_grad else x.floor()


def ste_round(x: Tensor) -> Tensor:
    """Round to nearest even, with the gradient of the identity in training."""
    return x + (x.round() - x).detach() if torch.is_grad_enabled() and x.requires_grad else x.round()


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent for integers in [-64, 64], from its bits (IEEE 754): no library's exp2 promises to be exact."""
    if exponent.dtype == torch.float64:
        return ((exponent.long() + 1023) << 52).view(torch.float64)
    return ((exponent.int() + 127) << 23).view(torch.float32)


def requantise(acc: Tensor, low: float, high: float) -> Tensor:
    """floor(acc) clamped to [low, high]. Where gradients are off, `acc` is overwritten."""
    if torch.is_grad_enabled():
        return ste_clamp(ste_floor(acc), low, high)
    return acc.floor_().clamp_(low, high)


def check_integers(what: str, shift: Tensor, *others: Tensor) -> None:
    """Raises:
    ValueError: one of these holds something else, or a shift is not from 0 to `MOST_SHIFT`; it says of what.
    """
    if not all(torch.equal(part, part.round()) for part in (shift, *others)):
        raise ValueError(f"{what}: expected integers")
    if shift.min() < 0 or shift.max() > MOST_SHIFT:
        raise ValueError(f"{what}: expected shifts from 0 to {MOST_SHIFT}")


@dataclass(frozen=True)
class ScaledLayer:
    """A layer ready to run: floor(x weight + bias), clamped, is floor((acc + 2^(shift-1)) * 2^-shift), clamped.

    Multiplying by a power of two loses nothing, so sums are as exact as those of the integers.

    Attributes:
        weight: (in, out) for a pointwise layer, (9, C) for a depthwise 3x3 layer, each column times its 2^-shift.
        bias: (8, out), a row per rate point, likewise, with the half that rounds.
        low, high: the clamp of the outputs.
    """

    weight: Tensor
    bias: Tensor
    low: int
    high: int

    def outputs(self, first: int, step: int) -> ScaledLayer:
        """Every `step`-th output from `first` on."""
        chosen = slice(first, None, step)
        return ScaledLayer(self.weight[:, chosen].contiguous(), self.bias[:, chosen].contiguous(), self.low, self.high)


@dataclass(frozen=True)
class IntegerLayer:
    """One layer's integers.

    Attributes:
        weight: (out, in) for a pointwise layer, (C, 9) for a depthwise 3x3 layer; within +-127.
        bias: (8, out), a row per rate point, in units of the accumulator.
        shift: (out,), the right shift after accumulation, 0 to 30.
        low, high: the clamp of the outputs; low = 0 makes it a rectifier.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    low: int
    high: int

    def check(self, name: str) -> None:
        """Raises:
        ValueError: these are not the integers that are promised above.
        """
        check_integers(f"layer {name}", self.shift, self.weight, self.bias)
        if not isinstance(self.low, int) or not isinstance(self.high, int):
            raise ValueError(f"layer {name}: expected integers for its clamp")
        if self.weight.abs().max() > WEIGHT_LIMIT:
            raise ValueError(f"layer {name}: expected weights within +-{WEIGHT_LIMIT}")

    def scaled(self, device: torch.device, dtype: torch.dtype) -> ScaledLayer:
        """The layer on its device, in a carrier that the caller knows to be exact for it."""
        weight, bias, shift = (part.to(device, dtype) for part in (self.weight, self.bias, self.shift))
        scale = power_of_two(-shift)
        return ScaledLayer((weight * scale[:, None]).T.contiguous(), bias * scale + 0.5, self.low, self.high)

    def bound(self, limit: int) -> float:
        """The largest magnitude a partial sum can take for inputs within +-limit, in its finest unit.

        The rounding term is included; without a shift that term is a half, which halves the unit.
        """
        weight, bias = self.weight.double().abs(), self.bias.double().abs()
        total = weight.sum(1) * limit + bias.amax(0) + power_of_two(self.shift.double() - 1)
        return float(torch.where(self.shift == 0, 2 * total, total).max())


def pointwise(x: Tensor, layer: ScaledLayer, rate: Tensor) -> Tensor:
    """1x1 layer as a matrix product. x: (B, ..., in) integers, rate: (B,) indexes. Returns (B, ..., out) integers."""
    flat = x.flatten(1, -2)
    acc = torch.baddbmm(layer.bias[rate][:, None], flat, layer.weight.expand(len(x), -1, -1))
    return requantise(acc, layer.low, layer.high).view(*x.shape[:-1], layer.weight.shape[1])


def depthwise(x: Tensor, layer: ScaledLayer, rate: Tensor) -> Tensor:
    """Depthwise 3x3 layer with zero padding, as nine shifted multiply-adds. x: (B, H, W, C) integers."""
    h, w = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    acc = layer.bias[rate][:, None, None]
    for tap in range(9):
        i, j = divmod(tap, 3)
        seen, weight = padded[:, i : i + h, j : j + w], layer.weight[tap]
        acc = torch.addcmul(acc, seen, weight) if tap == 0 or torch.is_grad_enabled() else acc.addcmul_(seen, weight)
    return requantise(acc, layer.low, layer.high)


class TrainableLayer(nn.Module):
    """Float parameters of one integer layer; `integers()` derives the layer, differentiably.

    The weight grid is a power of two per output channel, as fine as the 8-bit weights and half of float32's exact range
    (for inputs within +-input_limit) allow, but at least as fine as the outputs are finer than the inputs: weights of
    a deviation of 10 would leave that range (today's reach 2.8), and take float64 once they ship. The bias has two
    anchors, interpolated over the rate points.

    Args:
        inputs, outputs: channels; for a depthwise layer both are C and `taps` is 9.
        fraction_in, fraction_out: fractional bits of the inputs and the outputs.
        low, high: clamp of the outputs, in output integers.
        input_limit: largest magnitude of the input integers.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        taps: int | None = None,
        fraction_in: int = FRACTION,
        fraction_out: int = FRACTION,
        low: int = 0,
        high: int = LIMIT,
        input_limit: int = LIMIT,
    ) -> None:
        super().__init__()
        fan_in = taps or inputs
        self.weight = nn.Parameter(torch.randn(outputs, fan_in) * (2 / fan_in) ** 0.5)
        self.bias_low = nn.Parameter(torch.zeros(outputs))
        self.bias_high = nn.Parameter(torch.zeros(outputs))
        self.fraction_in, self.fraction_out = fraction_in, fraction_out
        self.low, self.high, self.input_limit = low, high, input_limit

    def integers(self, positions: Tensor) -> IntegerLayer:
        """positions: (R,) float, q in [0, 1] of each rate point. Returns the layer with R rows of biases."""
        with torch.no_grad():
            magnitude = self.weight.abs()
            finest = torch.minimum(
                WEIGHT_LIMIT / magnitude.amax(1).clamp_min(1e-6),
                FLOAT32_EXACT / 2 / self.input_limit / magnitude.sum(1).clamp_min(1e-6),
            )
            grid = finest.log2().floor().clamp(max(0, self.fraction_out - self.fraction_in), 18)
            shift = grid + (self.fraction_in - self.fraction_out)
        weight = ste_clamp(ste_round(self.weight * power_of_two(grid)[:, None]), -WEIGHT_LIMIT, WEIGHT_LIMIT)
        q = positions[:, None]
        bias = (self.bias_low * (1 - q) + self.bias_high * q) * power_of_two(grid + self.fraction_in)
        bias = ste_clamp(ste_round(bias), -FLOAT32_EXACT / 4, FLOAT32_EXACT / 4)
        return IntegerLayer(weight, bias, shift, self.low, self.high)
