"""The trainable codec: the float transforms, the prior's parameters and the rate estimate that training minimises.

    x -> g_a -> y -----------------> round(y - mu) + mu -> y_hat -> g_s -> x_hat
                |                          ^
                +-> h_a -> z -> z_hat -> prior

`ship` makes a shipped model from it; bitstreams are made and read by `service.codec.shipped`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from service.codec.config import RATE_POINTS, CodecConfig
from service.codec.exact import ste_clamp, ste_round
from service.codec.prior import MEAN_FRACTION, Part, PriorNet, PriorOutput, parts
from service.codec.report import ReportHead
from service.codec.tables import Z_LIMIT, gaussian_tables, level_to_scale, logistic_tables
from service.codec.transforms import GAIN_ANCHORS, Analysis, HyperAnalysis, Synthesis, rate_position

_LEAST_LIKELIHOOD = 2.0**-16
_UNIT = 2.0**MEAN_FRACTION


@dataclass(frozen=True)
class CodedLatents:
    """y, y_hat: (B, N, H/16, W/16); y_bits, z_bits: (B,), estimated per photo."""

    y: Tensor
    y_hat: Tensor
    y_bits: Tensor
    z_bits: Tensor


@dataclass(frozen=True)
class CodecOutput(CodedLatents):
    """x_hat besides: (B, 3, H, W), not clipped."""

    x_hat: Tensor


def _bits(likelihood: Tensor) -> Tensor:
    return -ste_clamp(likelihood, _LEAST_LIKELIHOOD, 1.0).log2()


def gaussian_bits(residual: Tensor, scale: Tensor) -> Tensor:
    """Bits of each of `residual`, rounded to integers, under zero-mean Gaussians of deviation `scale`."""
    inverse = 1 / (scale * math.sqrt(2))
    distance = residual.abs()
    return _bits(0.5 * (torch.erfc((distance - 0.5) * inverse) - torch.erfc((distance + 0.5) * inverse)))


class FactorizedPrior(nn.Module):
    """p(z): a logistic per channel, location and log scale interpolated between two rate anchors."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.location = nn.Parameter(torch.zeros(2, channels))
        self.log_scale = nn.Parameter(torch.zeros(2, channels))

    def parameters_at(self, rate: Tensor) -> tuple[Tensor, Tensor]:
        """rate: (B,) indexes. Returns location and scale, each (B, C)."""
        q = rate_position(rate)[:, None]
        location = self.location[0] * (1 - q) + self.location[1] * q
        log_scale = self.log_scale[0] * (1 - q) + self.log_scale[1] * q
        return location, ste_clamp(log_scale, -3, 4).exp()

    def forward(self, z: Tensor, rate: Tensor) -> Tensor:
        """Bits per photo of z (B, C, h, w)."""
        location, scale = (p[:, :, None, None] for p in self.parameters_at(rate))
        distance = (z - location).abs()
        bits = _bits(torch.sigmoid((0.5 - distance) / scale) - torch.sigmoid((-0.5 - distance) / scale))
        return bits.flatten(1).sum(1)


@dataclass(frozen=True)
class _Pass:
    """One pass over its part of the latents, all (B, n) in coding order: what the prior says, y, and y rounded."""

    mean: Tensor
    level: Tensor
    y: Tensor
    y_hat: Tensor

    @classmethod
    def of(cls, output: PriorOutput, part: Part, y: Tensor, skipped: int) -> _Pass:
        mean, seen = output.mean / _UNIT, part.gathered(y.permute(0, 2, 3, 1))
        steps = ste_round(seen - mean).masked_fill(output.level <= skipped, 0)
        return cls(mean, output.level, seen, mean + steps)

    def bits(self, training: bool, skipped: int) -> Tensor:
        """Per photo, with uniform noise in place of rounding where training."""
        seen = self.y + torch.rand_like(self.y) - 0.5 if training else self.y_hat
        return (gaussian_bits(seen - self.mean, level_to_scale(self.level)) * (self.level > skipped)).sum(1)


@lru_cache(maxsize=2)
def _parts(h: int, w: int, passes: int, device: torch.device) -> tuple[Part, ...]:
    """Kept, since crops are of one size, and a step that is captured may not ask the device for indexes."""
    with torch.inference_mode(False):
        return parts(h, w, passes, device)


class TrainableCodec(nn.Module):
    """All parameters of one model, for training; see the module's drawing.

    Attributes:
        noisy: in training g_s sees latents with uniform noise instead of rounded ones.
    """

    noisy = False

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.g_a = Analysis(config)
        self.g_s = Synthesis(config)
        self.h_a = HyperAnalysis(config)
        self.prior = PriorNet(config)
        self.z_prior = FactorizedPrior(config.hyper)

    def start_entropy_from(self, deviation: Tensor) -> None:
        """Fit the prior's scales to the typical deviation (N,) of each latent before its gain."""
        self.prior.start_from(deviation, GAIN_ANCHORS)

    def latent_gains(self) -> Tensor:
        """(8, N): the gain of g_a at every rate point."""
        rates = torch.arange(RATE_POINTS, device=self.prior.deviation.device)
        return self.g_a.gain(rates)[:, :, 0, 0]

    def normalise(self, y: Tensor, rate: Tensor) -> Tensor:
        """y over its typical deviation, the input of h_a."""
        return y / (self.g_a.gain(rate) * self.prior.deviation[:, None, None])

    def forward(self, x: Tensor, rate: Tensor) -> CodecOutput:
        """As `code`, and what the decoder makes of it."""
        coded = self.code(x, rate)
        return CodecOutput(coded.y, coded.y_hat, coded.y_bits, coded.z_bits, self.g_s(coded.y_hat, rate))

    def code(self, x: Tensor, rate: Tensor) -> CodedLatents:
        """x: (B, 3, H, W) in [0, 1], H and W multiples of 16. rate: (B,) int64, indexes 0..7.

        The rate is estimated with uniform noise in training mode and with rounded values in evaluation mode; g_s sees
        rounded latents in both. Which latents are too certain to be coded counts in evaluation mode only: in training
        all are, so that none is cut off from what it could learn.
        """
        y = self.g_a(x, rate)
        with torch.autocast(y.device.type, enabled=False):
            z = self.h_a(self.normalise(y, rate))
            z_hat = ste_clamp(ste_round(z), -Z_LIMIT, Z_LIMIT)
            prior = self.prior.integers(self.latent_gains()).on(y.device, torch.float32)
            h, w = y.shape[-2:]
            features = prior.features(z_hat, rate, h, w)
            skipped = -1 if self.training else self.config.skipped
            known, y_bits = y.new_zeros(()), y.new_zeros(len(y))
            for index, part in enumerate(_parts(h, w, prior.passes, y.device)):
                one = _Pass.of(prior.predict(index, features, known * _UNIT, rate, part), part, y, skipped)
                known = known + part.placed(one.y_hat, h, w)
                y_bits = y_bits + one.bits(self.training, skipped)
            y_hat = known.permute(0, 3, 1, 2)
            if self.training and self.noisy:
                y_hat = y + torch.rand_like(y) - 0.5
            z_bits = self.z_prior(z + torch.rand_like(z) - 0.5 if self.training else z_hat, rate)
        return CodedLatents(y, y_hat, y_bits, z_bits)


def ship(model: TrainableCodec, report: ReportHead | None = None) -> tuple[dict[str, Tensor], str]:
    """Freeze a trained model: float16 transforms, integer prior and tables, and a JSON description of its shape."""
    with torch.no_grad():
        prior = model.prior.integers(model.latent_gains())
        location, scale = model.z_prior.parameters_at(torch.arange(RATE_POINTS))
    tensors = {
        f"{name}.{key}": value.to(torch.float16)
        for name in ("g_a", "g_s", "h_a")
        for key, value in getattr(model, name).state_dict().items()
    }
    if report:
        tensors |= {f"report.{key}": value.float() for key, value in report.state_dict().items()}
    tensors["deviation"] = model.prior.deviation.float()
    for name, layer in prior.layers.items():
        tensors[f"prior.{name}.weight"] = layer.weight.to(torch.int8)
        tensors[f"prior.{name}.bias"] = layer.bias.to(torch.int32)
        tensors[f"prior.{name}.shift"] = layer.shift.to(torch.int8)
    rescales = {"mean": prior.mean_rescale, "context": prior.context_rescale}
    for name, rescale in rescales.items():
        tensors[f"rescale.{name}.factor"] = rescale.factor.to(torch.int16)
        tensors[f"rescale.{name}.shift"] = rescale.shift.to(torch.int8)
    z_tables = logistic_tables(location.double().flatten().numpy(), scale.double().flatten().numpy())
    tensors |= gaussian_tables().to_tensors("y") | z_tables.to_tensors("z")
    description = {
        "config": asdict(model.config),
        "clamps": {name: [layer.low, layer.high] for name, layer in prior.layers.items()},
        "limits": {name: rescale.limit for name, rescale in rescales.items()},
    }
    return {name: value.contiguous() for name, value in tensors.items()}, json.dumps(description, sort_keys=True)
