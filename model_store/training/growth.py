"""A trained model as the start of a larger one that at first does exactly the same (Chen et al., "Net2Net", ICLR 2016).

What can grow: the passes of the prior, the HATBs of a stage, and a finer stage in front of g_a and behind g_s. So
`base` starts from all that `edge` has learned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from service.codec.config import CodecConfig
from service.codec.model import TrainableCodec
from service.codec.prior import ORDINALS, layer_names

_FLAT, _DETAIL, _IDLE = 0.5, 2.0, 0.5
"""Of the finer stage at first: the scales of mean colours and of detail, and what stands in the channels beyond. Layer
norms then see detail whether a patch is bright or grey."""

_BLOCK = re.compile(r"g_[as]\.stacks\.\d+\.blocks\.\d+\.")


def grown(weights: Mapping[str, Tensor], config: CodecConfig) -> dict[str, Tensor]:
    """Weights of a model that is `config` or a part of it, with whatever they lack."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = TrainableCodec(config).state_dict()
    out = _with_passes(weights, config.passes)
    if len(out["g_a.stem.conv.weight"][0]) == 4 * 3 * config.stem**2:
        out = _with_finer_stage(out, fresh, config)
    blocks = {name: value for name, value in fresh.items() if _BLOCK.match(name)}
    return {**blocks, **out}  # a fresh block is the identity


def _with_passes(weights: Mapping[str, Tensor], passes: int) -> dict[str, Tensor]:
    """With the layers of the passes that the prior lacks: those of its second one.

    The third of four passes then says what the second of two did; the others have yet to learn.
    """
    out = dict(weights)
    for name in sorted(layer_names(passes) - layer_names(2)):
        second = f"{ORDINALS[1]}_{name.partition('_')[2]}"
        for kind in ("weight", "bias_low", "bias_high"):
            out.setdefault(f"prior.layers.{name}.{kind}", weights[f"prior.layers.{second}.{kind}"].clone())
    return out


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT of `size` x `size` patches of three colours: (3 size^2, 3 size^2), a row per coefficient."""
    place, frequency = torch.arange(size) + 0.5, torch.arange(size)[:, None]
    line = torch.cos(math.pi / size * frequency * place) * (2 / size) ** 0.5
    line[0] *= 0.5**0.5
    return torch.kron(torch.eye(3), torch.kron(line, line))


def _with_finer_stage(
    weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor], config: CodecConfig
) -> dict[str, Tensor]:
    """With a stage of twice the resolution that holds a DCT of its patches.

    The old stem becomes the down behind it, the old head the up before it. Channels beyond the DCT's are constant; how
    they are read is random, and made up for by a bias.
    """
    size, dim = config.stem, config.stages[0].dim
    basis = _cosines(size)
    count = len(basis)
    if dim < count:
        raise ValueError(f"expected a first stage of at least {count} channels, got {dim}")
    scale = torch.full((3, size * size), _DETAIL)
    scale[:, 0] = _FLAT
    scale = scale.flatten()[:, None]
    idle = torch.full((dim - count,), _IDLE)

    last = len(config.stages) - 1  # of g_s, which goes from coarse to fine
    up = f"g_s.ups.{last - 1}.conv"
    new = ("g_a.stem.", "g_a.stacks.0.", "g_a.downs.0.", f"{up}.", f"g_s.stacks.{last}.", "g_s.head.")
    out = {_one_stage_later(name): value for name, value in weights.items()}
    out |= {name: value.clone() for name, value in fresh.items() if name.startswith(new)}

    stem, bias = out["g_a.stem.conv.weight"], out["g_a.stem.conv.bias"]
    stem[:, :, 0, 0] = torch.cat([scale * basis, torch.zeros(dim - count, count)])
    bias[:] = torch.cat([torch.zeros(count), idle])
    down, bias = out["g_a.downs.0.conv.weight"].view(-1, dim, 2, 2), out["g_a.downs.0.conv.bias"]
    down[:, :count] = torch.einsum("kn,onpq->okpq", basis / scale, _quarters(weights["g_a.stem.conv.weight"], size))
    bias[:] = weights["g_a.stem.conv.bias"] - (down[:, count:].sum((2, 3)) @ idle)

    old = _quarters(weights["g_s.head.conv.weight"].transpose(0, 1), size)
    rise, bias = out[f"{up}.weight"].view(dim, 2, 2, -1), out[f"{up}.bias"].view(dim, 2, 2)
    rise[:count] = torch.einsum("kn,onpq->kpqo", scale * basis, old)
    rise[count:] = 0
    old_bias = _quarters(weights["g_s.head.conv.bias"][None], size)
    bias[:count] = torch.einsum("kn,onpq->kpq", scale * basis, old_bias)
    bias[count:] = _IDLE
    head, bias = out["g_s.head.conv.weight"], out["g_s.head.conv.bias"]
    head[:, :count, 0, 0] = (basis / scale).T
    bias[:] = -head[:, count:, 0, 0] @ idle
    return out


def _one_stage_later(name: str) -> str:
    return re.sub(r"^(g_a\.(?:stacks|downs)\.)(\d+)", lambda found: f"{found[1]}{int(found[2]) + 1}", name)


def _quarters(patches: Tensor, size: int) -> Tensor:
    """(O, 3 (2 size)^2, ...) over pixel-unshuffled patches -> (O, 3 size^2, 2, 2), over those of their quarters."""
    pixels = patches.reshape(len(patches), 3, 2, size, 2, size)  # colour, half and row, half and column
    return pixels.permute(0, 1, 3, 5, 2, 4).reshape(len(patches), 3 * size * size, 2, 2)
