"""`python -m service.codec.cost`: parameters and multiply-accumulates per pixel of every size.

The count is of one photo through g_a, h_a, the prior and g_s: convolutions, matrix products and the prior's layers;
norms, activations and gains are left out, as the papers do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from service.codec.blocks import ContentAggregation
from service.codec.config import CONFIGS, CodecConfig
from service.codec.model import TrainableCodec
from service.codec.prior import OUTPUTS
from service.codec.transforms import Resample

_SIDE = 256


@dataclass(frozen=True)
class Cost:
    """Parameters, and thousands of multiply-accumulates per pixel of encoder, decoder and entropy model."""

    parameters: int
    encoder: float
    decoder: float
    entropy: float

    @property
    def kmac_per_pixel(self) -> float:
        return self.encoder + self.decoder + self.entropy


def _transform_macs(module: nn.Module, *inputs: Tensor) -> int:
    total = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, Resample) and not (layer.up or layer.overlap):  # convolves by itself
            total += output.numel() * layer.conv.weight[0].numel()
        elif isinstance(layer, ContentAggregation):
            total += 2 * output.numel() * layer.group  # q k^T and its product with v

    hooks = [layer.register_forward_hook(count) for layer in module.modules()]
    with torch.inference_mode():
        module(*inputs)
    for hook in hooks:
        hook.remove()
    return total


def cost(config: CodecConfig) -> Cost:
    """Count one size."""
    model = TrainableCodec(config).eval()
    pixels, rate = _SIDE**2, torch.tensor([0])
    x = torch.zeros(1, 3, _SIDE, _SIDE)
    y = torch.zeros(1, config.latents, _SIDE // 16, _SIDE // 16)
    positions = {"enter": 64**2, "local1": 64**2, "up1": 64**2, "local2": 32**2, "up2": 32**2}
    positions |= dict.fromkeys(OUTPUTS, 2 * 16**2)  # first and later ones together speak of every latent, once
    prior = sum(
        model.prior.layer(name).weight.numel() * pixels // positions.get(name, 16**2) for name in model.prior.layers
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(
        parameters,
        _transform_macs(model.g_a, x, rate) / pixels / 1e3,
        _transform_macs(model.g_s, y, rate) / pixels / 1e3,
        (_transform_macs(model.h_a, y) + prior) / pixels / 1e3,
    )


def main() -> None:
    print(f"{'size':8} {'parameters':>11} {'encoder':>8} {'decoder':>8} {'entropy':>8} {'kMAC/px':>8}")
    for name, config in CONFIGS.items():
        c = cost(config)
        print(f"{name:8} {c.parameters:11,} {c.encoder:8.1f} {c.decoder:8.1f} {c.entropy:8.1f} {c.kmac_per_pixel:8.1f}")


if __name__ == "__main__":
    main()
