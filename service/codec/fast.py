"""The block stacks as they run in the service: the function of `blocks.HATB`, in fewer steps and in bounded memory.

- A photo passes through each branch in strips of rows, a panorama of columns. A strip sees the rows beside it that its
  convolutions reach, so the result does not depend on the strips: there are no seams. C-GA, which looks at the whole
  photo, first adds up its correlations over all strips.
- out(attention v) is one product: the attention, a small matrix, is multiplied into the output projection first.
- Weights are kept in the precision of the products; the residual stream is float32, (B, H, W, C), changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.codec.blocks import HATB, ChannelNorm, ContentAggregation, DegradationAttention, GatedFeedForward
from service.codec.transforms import Analysis, BlockStack, Resample, Synthesis

STRIP_POSITIONS = 2**14
"""Positions (rows x columns of the residual stream) of one strip: work for every core, little memory."""

PANORAMA = 4
"""How many times as wide as high a photo is that is cut into columns: strips of its few rows would not be small."""

Branch = Callable[[Tensor], Tensor]


def _strips(height: int, width: int) -> tuple[int, list[tuple[int, int]]]:
    """What is cut, 1 for rows and 2 for columns; the first of each of nearly equal strips, and those after the last."""
    axis = 2 if width > PANORAMA * height else 1
    count, length = max(1, round(height * width / STRIP_POSITIONS)), (height, width)[axis - 1]
    edges = [length * index // count for index in range(count + 1)]
    return axis, [(start, end) for start, end in pairwise(edges) if end > start]


def _cut(x: Tensor, axis: int, start: int, end: int) -> Tensor:
    return x.narrow(axis, start, end - start)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for (B, n, m) and (B, m, k); on the CPU photo by photo, twice as fast there."""
    return torch.stack([x @ y for x, y in zip(a, b)]) if a.device.type == "cpu" else a @ b


class _Pointwise(nn.Module):
    weight: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight[:, :, 0, 0].to(dtype).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _Depthwise(nn.Module):
    weight: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(dtype))
        self.padding = weight.shape[2] // 2, weight.shape[3] // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight, padding=self.padding, groups=len(self.weight))
        return y.permute(0, 2, 3, 1)


class _Norm(nn.Module):
    """Of the residual stream, in float32; the result is `dtype`."""

    def __init__(self, norm: ChannelNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = norm.weight, dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight).to(self.dtype)


class _Content(nn.Module):
    """C-GA on x (B, H, W, C), in place."""

    def __init__(self, norm: ChannelNorm, module: ContentAggregation, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.group, self.temperature = _Norm(norm, dtype), module.group, module.temperature
        self.qkv, self.local = _Pointwise(module.qkv.weight, dtype), _Depthwise(module.local.weight, dtype)
        self.out = nn.Parameter(module.out.weight[:, :, 0, 0], requires_grad=False)

    def forward(self, x: Tensor) -> None:
        b, h, w, c = x.shape
        axis, strips = _strips(h, w)
        correlation, square_q, square_k = x.new_zeros(b, c, c), x.new_zeros(b, c), x.new_zeros(b, c)
        values = []
        for start, end in strips:
            low, high = max(0, start - 1), min(x.shape[axis], end + 1)
            qkv = _cut(self.local(self.qkv(self.norm(_cut(x, axis, low, high)))), axis, start - low, end - low)
            q, k, v = qkv.reshape(b, -1, 3 * c).chunk(3, -1)
            correlation += _products(q.transpose(1, 2), k).float()
            square_q += (q * q).sum(1, dtype=torch.float32)
            square_k += (k * k).sum(1, dtype=torch.float32)
            values.append(v.clone() if len(strips) > 1 else v)  # a view would keep q and k
        mixing = self._mixing(correlation, square_q, square_k).to(values[0].dtype).transpose(1, 2)
        for (start, end), v in zip(strips, values):
            strip = _cut(x, axis, start, end)
            strip += _products(v, mixing).view(strip.shape)

    def _mixing(self, correlation: Tensor, square_q: Tensor, square_k: Tensor) -> Tensor:
        """The output projection times the attention, (B, C, C)."""
        b, c, _ = correlation.shape
        heads = c // self.group
        scale = square_q.clamp_min(1e-12).rsqrt()[:, :, None] * square_k.clamp_min(1e-12).rsqrt()[:, None]
        groups = (correlation * scale).view(b, heads, self.group, heads, self.group)
        own = groups.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        attention = (own * self.temperature).softmax(-1)
        return torch.einsum("oij,bijk->boik", self.out.view(c, heads, self.group), attention).reshape(b, c, c)


class _Degradation(nn.Module):
    """S-DA of x (B, H, W, C)."""

    def __init__(self, norm: ChannelNorm, module: DegradationAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = _Norm(norm, dtype)
        self.query, self.value, self.out = (
            _Pointwise(part.weight, dtype) for part in (module.query, module.value, module.out)
        )
        self.rows, self.columns = _Depthwise(module.rows.weight, dtype), _Depthwise(module.columns.weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        attention = self.columns(F.gelu(self.rows(F.gelu(self.query(x)))))
        result: Tensor = self.out(attention.mul_(self.value(x)))
        return result


class _FeedForward(nn.Module):
    """FFN of x (B, H, W, C); its halves apart, so that each is contiguous."""

    def __init__(self, norm: ChannelNorm, module: GatedFeedForward, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = _Norm(norm, dtype)
        self.gate, self.value = (
            nn.Sequential(_Pointwise(wide, dtype), _Depthwise(near, dtype))
            for wide, near in zip(module.expand.weight.chunk(2), module.local.weight.chunk(2))
        )
        self.out = _Pointwise(module.out.weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        result: Tensor = self.out(F.gelu(self.gate(x)).mul_(self.value(x)))
        return result


def _add(x: Tensor, branch: Branch, reach: int) -> None:
    """x += branch(x) in place, strip by strip, for a branch that reaches so many rows up and down, and columns."""
    axis, strips = _strips(x.shape[1], x.shape[2])
    if len(strips) == 1:
        x += branch(x)
        return
    before = _cut(x, axis, 0, 0)
    for start, end in strips:
        seen = torch.cat([before, _cut(x, axis, start, min(x.shape[axis], end + reach))], axis)
        first, last = before.shape[axis], before.shape[axis] + end - start
        strip = _cut(x, axis, start, end)
        strip += _cut(branch(seen), axis, first, last)
        before = _cut(seen, axis, max(0, last - reach), last).clone()  # as it was


def _untold() -> None:
    pass


class FastStack(nn.Module):
    """A `BlockStack` for inference, with its weights in `dtype`. Takes and returns (B, C, H, W) float32.

    Attributes:
        tell: called after each of its `steps`, the branches of all blocks, which take about equally long.
    """

    tell: Callable[[], None]

    def __init__(self, stack: BlockStack, dtype: torch.dtype) -> None:
        super().__init__()
        self.gain, self.tell = stack.gain, _untold
        blocks = [block for block in stack.blocks if isinstance(block, HATB)]
        self.content = nn.ModuleList(_Content(block.norm1, block.content, dtype) for block in blocks)
        self.degradation = nn.ModuleList(_Degradation(block.norm2, block.degradation, dtype) for block in blocks)
        self.feed_forward = nn.ModuleList(_FeedForward(block.norm3, block.ffn, dtype) for block in blocks)

    @property
    def steps(self) -> int:
        return 3 * len(self.content)

    def forward(self, x: Tensor, rate: Tensor) -> Tensor:
        x = (x * self.gain(rate)).permute(0, 2, 3, 1).contiguous()
        for content, degradation, feed_forward in zip(self.content, self.degradation, self.feed_forward):
            content(x)
            self.tell()
            _add(x, degradation, 2)
            self.tell()
            _add(x, feed_forward, 1)
            self.tell()
        return x.permute(0, 3, 1, 2)


class FastResample(nn.Module):
    """A first or last `Resample` for inference, strip by strip of its coarse side. x: (B, C, H, W)."""

    def __init__(self, resample: Resample) -> None:
        super().__init__()
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        rows = 1 if self.resample.up else self.resample.factor  # of x, per row of the coarse side; and columns
        axis, strips = _strips(x.shape[2] // rows, x.shape[3] // rows)
        axis += 1
        result = x.new_empty(0)
        for start, end in strips:
            part = self.resample(_cut(x, axis, start * rows, end * rows))
            if len(strips) == 1:
                return part
            finer = part.shape[axis] // (end - start)  # rows or columns of the result, per one of the coarse side
            if not start:
                shape = list(part.shape)
                shape[axis] = finer * strips[-1][1]
                result = torch.empty(shape, device=x.device, memory_format=torch.channels_last)
            _cut(result, axis, finer * start, finer * end).copy_(part)
        return result


def speed_up(transform: Analysis | Synthesis, dtype: torch.dtype) -> None:
    """Put fast stacks and a fast outer layer into a loaded transform; then it can be neither trained nor saved."""
    outer = "stem" if isinstance(transform, Analysis) else "head"
    resample = getattr(transform, outer)
    if not resample.overlap:
        setattr(transform, outer, FastResample(resample))
    transform.stacks = nn.ModuleList(
        FastStack(stack, dtype) for stack in transform.stacks if isinstance(stack, BlockStack)
    )
