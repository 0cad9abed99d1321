"""What training minimises the logarithm of: balanced distortion at the lambda of each sample's rate point, plus bpp."""

from __future__ import annotations

import torch
from torch import Tensor

from service.codec.config import RATE_POINTS

LAMBDA_RANGE = (40.0, 8000.0)
"""Bits per pixel that one unit of MSE (pixels in [0, 1]) costs, at the smallest and the best rate point."""

_BALANCE = 2.0  # bits per pixel of distortion up to which MSE counts in full


def rate_lambda(rate: Tensor) -> Tensor:
    """rate: (B,) indexes 0..7. Returns (B,), log-spaced over the rate points."""
    low, high = LAMBDA_RANGE
    return low * (high / low) ** (rate.float() / (RATE_POINTS - 1))


def balanced_distortion(mse: Tensor, weight: Tensor) -> Tensor:
    """MSE up to tau = 2/lambda, tau (1 + ln(MSE/tau)) above, both (B,).

    A heavy degradation has up to 100 times the MSE of a clean photo and would drown it in a plain mean.
    """
    tau = _BALANCE / weight
    return torch.where(mse <= tau, mse, tau * (1 + (mse / tau).clamp_min(1e-6).log()))
