"""What training minimises the logarithm of: balanced distortion at the lambda of each sample's rate point, plus bpp."""

from __future__ import annotations

import torch
from torch import Tensor

_BALANCE = 2.0  # bits per pixel of distortion up to which MSE counts in full


def balanced_distortion(mse: Tensor, weight: Tensor) -> Tensor:
    """MSE up to tau = 2/lambda, tau (1 + ln(MSE/tau)) above, both (B,).

    A heavy degradation has up to 100 times the MSE of a clean photo and would drown it in a plain mean.
    """
    tau = _BALANCE / weight
    return torch.where(mse <= tau, mse, tau * (1 + (mse / tau).clamp_min(1e-6).log()))
