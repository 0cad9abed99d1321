"""Depthwise convolutions as sums of shifted products, for compiled training on a GPU: one fused kernel each way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShiftedDepthwise(nn.Conv2d):
    """A depthwise convolution of odd kernel that keeps its input's size; summed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        (rows, columns), (h, w) = self.kernel_size, x.shape[2:]
        seen = F.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2))
        total = torch.zeros((), device=x.device)
        for i in range(rows):
            for j in range(columns):
                total = total + seen[:, :, i : i + h, j : j + w] * self.weight[:, 0, i, j, None, None]
        return total.to(x.dtype)


def shift_depthwise(model: nn.Module) -> None:
    """Turn every such convolution of a model into shifts, parameters and all."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels and module.groups > 1:
            module.__class__ = ShiftedDepthwise
