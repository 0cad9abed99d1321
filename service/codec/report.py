"""The degradation report: a small head on the features of g_a that tells what is wrong with a photo, and how badly.

    into stage at 1/8 -> deviations over the photo; 1x1, GELU -> means, deviations -+
    out of it         -> deviations over the photo; 1x1, GELU -> means, deviations -+-> two layers -> kinds, strengths

It changes no pixel and no latent: what it says goes into the bitstream's header and to whoever watches the cameras.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.codec.bitstream import Degradation, DegradationKind
from service.codec.config import CodecConfig
from service.codec.transforms import asinh

KINDS = tuple(kind for kind in DegradationKind if kind is not DegradationKind.CLEAN)
"""What the head can find, in the order of its outputs."""

HARMLESS, SPAN = 40.0, 30.0
"""PSNR, dB, that a flaw of strength 0 leaves by itself, and how much less one of strength 1 does."""

_WIDTH, _HIDDEN = 64, 128
_POSITIONS = 2**11


class ReportHead(nn.Module):
    """Watches a pass of g_a, then tells.

    Attributes:
        deviation: (2, C), the typical deviation of both feature maps on clean photos; training sets it.
    """

    deviation: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        dim = config.stages[config.watched].dim
        self.register_buffer("deviation", torch.ones(2, dim))
        self.look = nn.ModuleList(nn.Linear(dim, _WIDTH) for _ in range(2))
        self.tell = nn.Sequential(
            nn.Linear(2 * (2 * _WIDTH + dim), _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, 2 * len(KINDS))
        )

    def summary(self, level: int, features: Tensor) -> Tensor:
        """features: (B, C, H, W), into the stage (level 0) or out of it (1). Returns (B, 128 + C), whatever H and W.

        A large photo is looked at on a regular grid of about `_POSITIONS` positions. Deviations are given as their
        logarithm: a blur shows in what is missing.
        """
        b, c, h, w = features.shape
        step = math.ceil(math.sqrt(h * w / _POSITIONS))
        x = features[:, :, ::step, ::step].permute(0, 2, 3, 1).reshape(b, -1, c).float()
        x = asinh(x / self.deviation[level])
        x = torch.cat([x, F.gelu(self.look[level](x))], -1)
        mean = x.mean(1)
        deviation = 0.5 * (x.square().mean(1) - mean.square()).clamp_min(1e-6).log()
        return torch.cat([mean[:, c:], deviation], 1)

    def forward(self, summaries: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Both summaries. Returns log odds of presence and strengths, both (B, 7) in the order of `KINDS`."""
        odds, strength = self.tell(torch.cat(summaries, 1)).chunk(2, 1)
        return odds, strength

    def findings(self, summaries: list[Tensor]) -> list[tuple[Degradation, ...]]:
        """Per photo what is more likely there than not, strongest first.

        A photo on which nothing is found is `clean`, with the probability of the likeliest flaw short of 1 as strength.
        """
        odds, strength = self(summaries)
        return [
            _findings(chances, strengths)
            for chances, strengths in zip(odds.sigmoid().tolist(), strength.clamp(1 / 255, 1).tolist())
        ]


def _findings(chances: list[float], strengths: list[float]) -> tuple[Degradation, ...]:
    found = [_stored(kind, s) for kind, p, s in zip(KINDS, chances, strengths) if p > 0.5]
    found.sort(key=lambda one: -one.strength)
    return tuple(found) or (_stored(DegradationKind.CLEAN, 1 - max(chances)),)


def _stored(kind: DegradationKind, strength: float) -> Degradation:
    """A finding as the bitstream keeps it, so that writer and reader say the same."""
    return Degradation(kind, round(strength * 255) / 255)
