"""The hybrid-attention transformer block (HATB) of "All-in-One Image Compression and Restoration" (arXiv 2502.03649).

    x -> + C-GA(LN(x)) -> + S-DA(LN(x)) -> + FFN(LN(x)) ->

The block keeps its residual stream in the precision of x; its branches run in whatever autocast says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, H, W), with a gain and without a bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns the same shape."""
        return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.weight).permute(0, 3, 1, 2)


def _pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def _depthwise(dim: int, kernel: tuple[int, int]) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel, padding=(kernel[0] // 2, kernel[1] // 2), groups=dim, bias=False)


def _output(inputs: int, outputs: int) -> nn.Conv2d:
    """The last projection of a branch: zero at first, so that a fresh block is the identity."""
    conv = _pointwise(inputs, outputs)
    nn.init.zeros_(conv.weight)
    return conv


class ContentAggregation(nn.Module):
    """C-GA: attention across the channels of each group; the whole image is its receptive field.

    q and k are L2-normalised over space, so that the cost is linear in pixels and the product is a correlation.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.group = dim // heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = _pointwise(dim, 3 * dim)
        self.local = _depthwise(3 * dim, (3, 3))
        self.out = _output(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns the same shape."""
        b, c, h, w = x.shape
        qkv = self.local(self.qkv(x)).permute(0, 2, 3, 1).reshape(b, h * w, 3, c // self.group, self.group)
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # each (B, groups, group, H*W)
        norm_q = q.float().square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        norm_k = k.float().square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        correlation = (q @ k.transpose(-2, -1)).float() * norm_q * norm_k.transpose(-2, -1)
        attention = (correlation * self.temperature).softmax(-1)
        mixed = attention.to(v.dtype) @ v
        return self.out(mixed.permute(0, 3, 1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2))


class DegradationAttention(nn.Module):
    """S-DA: spatially decoupled attention, a 1x5 and a 5x1 look that picks out streaks, flakes and grain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = _pointwise(dim, dim)
        self.rows = _depthwise(dim, (1, 5))
        self.columns = _depthwise(dim, (5, 1))
        self.value = _pointwise(dim, dim)
        self.out = _output(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns the same shape."""
        attention = self.columns(F.gelu(self.rows(F.gelu(self.query(x)))))
        return self.out(attention * self.value(x))


class GatedFeedForward(nn.Module):
    """FFN: 1x1 to two halves, depthwise 3x3, one half gates the other, 1x1 back."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.expand = _pointwise(dim, 2 * hidden)
        self.local = _depthwise(2 * hidden, (3, 3))
        self.out = _output(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns the same shape."""
        gate, value = self.local(self.expand(x)).chunk(2, 1)
        return self.out(F.gelu(gate) * value)


class HATB(nn.Module):
    """One hybrid-attention transformer block on (B, dim, H, W); the identity when fresh."""

    def __init__(self, dim: int, heads: int, ffn: float) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(dim)
        self.content = ContentAggregation(dim, heads)
        self.norm2 = ChannelNorm(dim)
        self.degradation = DegradationAttention(dim)
        self.norm3 = ChannelNorm(dim)
        self.ffn = GatedFeedForward(dim, ffn)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns the same shape."""
        x = x + self.content(self.norm1(x))
        x = x + self.degradation(self.norm2(x))
        return x + self.ffn(self.norm3(x))
