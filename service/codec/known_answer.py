"""Known-answer tests: what the exact path must say of one input on every device before a model may serve on it, and
the entropy coder on every machine."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import torch
from torch import Tensor

from service.codec.config import RATE_POINTS
from service.codec.prior import parts
from service.codec.rans import Decoder, Encoder, GuardedTables
from service.codec.shipped import ShippedCodec
from service.codec.tables import CdfTables


@torch.inference_mode()
def known_answer(codec: ShippedCodec) -> str:
    """SHA-256 of what the prior says of a fixed pseudo-random input at every rate point; the same everywhere.

    Every pass is asked about every part of the latents.
    """
    h, w = 10, 7  # z is 3x2: both crops of the upsampled features are exercised
    rate = torch.arange(RATE_POINTS, device=codec.device)
    z_hat = _pattern(codec.config.hyper, 3, 2, 23, 1).to(codec.device) - 11
    y_hat = (_pattern(codec.config.latents, h, w, 4001, 2).to(codec.device) - 2000).permute(0, 2, 3, 1)
    features = codec.prior.features(z_hat, rate, h, w)
    each = parts(h, w, codec.prior.passes, codec.device)
    known = torch.zeros_like(y_hat)
    digest = hashlib.sha256()
    for index, part in enumerate(each):
        outputs = [codec.prior.predict(index, features, known, rate, asked) for asked in each]
        for values in ([output.mean for output in outputs], [output.level for output in outputs]):
            whole = sum((asked.placed(one, h, w) for asked, one in zip(each, values)), torch.zeros_like(y_hat))
            digest.update(whole.permute(0, 3, 1, 2).to(torch.int32).cpu().numpy().astype("<i4").tobytes())
        known = known + part.placed(part.gathered(y_hat), h, w)
    return digest.hexdigest()


CODER_ANSWER = "4ca7413e29c816c5ae869412c103ab6b801ef38afdc4480be2b00b0b57a19efa"


@cache
def coder_answer() -> str:
    """SHA-256 of the bytes that the entropy coder makes of fixed symbols, and of what it reads from them again."""
    tables = GuardedTables(
        CdfTables.from_masses([np.arange(1.0, 18), np.ones(300), np.array([1.0, 2000, 3])], [-8, -150, -1])
    )
    index = np.arange(3000, dtype=np.int32)
    rows = index % 3
    symbols = tables.clip(index * 7919 % 301 - 150, rows)
    encoder = Encoder()
    encoder.add(symbols, rows, tables)
    payload = encoder.finish()
    again = Decoder(payload, len(rows)).take(rows, tables)
    return hashlib.sha256(payload + again.astype("<i4").tobytes()).hexdigest()


def _pattern(channels: int, h: int, w: int, modulus: int, salt: int) -> Tensor:
    """(8, channels, h, w) integers in [0, modulus), by integer arithmetic only."""
    index = np.arange(RATE_POINTS * channels * h * w, dtype=np.uint64) + np.uint64(salt * 1_000_003)
    mixed = (index * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    values = (mixed % np.uint64(modulus)).astype(np.float32)
    return torch.from_numpy(values).reshape(RATE_POINTS, channels, h, w)
