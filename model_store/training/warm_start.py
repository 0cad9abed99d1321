"""Warm start: g_a and g_s begin as a multi-stage KLT, a working transform coder that training then improves.

The stem and every down are the leading principal components of what enters them, g_s holds their transposes, and the
HATBs between are fresh, hence the identity. A model whose stem has stride 1 starts from its random 3x3 stem instead.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_store.training.photos import PhotoPool
from service.codec.model import TrainableCodec
from service.codec.transforms import Resample


def principal_components(vectors: Tensor, count: int) -> Tensor:
    """The leading orthonormal directions of `vectors` (n, d) about zero, as rows: (count, d), most energy first."""
    vectors = vectors.double()
    _, directions = torch.linalg.eigh(vectors.T @ vectors)
    return directions.flip(1)[:, :count].T.contiguous()


@torch.no_grad()
def warm_start(model: TrainableCodec, pool: PhotoPool, crops: int = 600, seed: int = 1) -> None:
    """Set the resampling layers of `model` and its entropy scales from random crops of `pool`."""
    if model.config.stem == 1:
        return
    generator = torch.Generator().manual_seed(seed)
    x = pool.crops(crops, min(160, pool.crop), generator).cpu() - 0.5
    pairs = zip([model.g_a.stem, *model.g_a.downs], [model.g_s.head, *list(model.g_s.ups)[::-1]])
    for down, up in pairs:
        down, up = cast(Resample, down), cast(Resample, up)
        x = F.pixel_unshuffle(x, down.factor)
        inputs, outputs = down.conv.in_channels, down.conv.out_channels
        basis = torch.zeros(outputs, inputs)
        components = principal_components(x.permute(0, 2, 3, 1).reshape(-1, inputs), outputs)
        basis[: len(components)] = components.float()
        down.conv.weight.copy_(basis[:, :, None, None])
        # Channels beyond the components are zero in g_a, for its blocks to fill; g_s keeps its random weights for them.
        up.conv.weight[:, : len(components)] = basis[: len(components)].T[:, :, None, None].to(up.conv.weight.device)
        nn.init.zeros_(cast(Tensor, down.conv.bias))
        nn.init.zeros_(cast(Tensor, up.conv.bias))
        x = F.conv2d(x, basis[:, :, None, None])
    model.start_entropy_from(x.std((0, 2, 3)).clamp_min(1e-4).to(model.prior.deviation.device))
