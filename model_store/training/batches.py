"""Batches for training: crops, what is wrong with them and the rate point of each, drawn on the training device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model_store.degradations import TRAINING, Kind, degrade_measured
from model_store.training.photos import tone_jittered
from service.codec.config import RATE_POINTS

KIND_SHARES: dict[Kind, float] = {
    Kind.CLEAN: 0.28,
    Kind.NOISE: 0.18,
    Kind.SENSOR_NOISE: 0.10,
    Kind.RAIN: 0.10,
    Kind.SNOW: 0.05,
    Kind.HAZE: 0.13,
    Kind.LOW_LIGHT: 0.11,
    Kind.BLUR: 0.02,
    Kind.JPEG: 0.02,
}
"""How often each kind is drawn alone; what is left to 1 are mixtures of two."""

UPLOAD_JPEG = 0.1
"""Share of the degraded photos that arrive as JPEG besides, as gateways send them."""


class Pool(Protocol):
    """Where clean pictures come from."""

    def crops(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """(count, 3, size, size) float32 in [0, 1]. `generator` is a CPU one."""
        ...


@dataclass(frozen=True)
class Batch:
    """Degraded photos, their clean originals, both (B, 3, H, W), the rate index of each, (B,), and what was done."""

    degraded: Tensor
    clean: Tensor
    rate: Tensor
    kinds: list[tuple[Kind, ...]]
    added_mse: list[dict[Kind, float]]


class Batches:
    """Endless batches; all randomness comes from two generators whose state a checkpoint keeps. `size` and `crop` may
    change between batches.

    Args:
        toned: share of the photographs that are darker, brighter or flatter, and still clean.
        one_kind: per batch. A hazy photo's gradient is 13 times as long as a clean one's; of both in one batch,
            clipped, next to nothing of the latter would be left.
    """

    def __init__(
        self, pool: Pool, size: int, crop: int, device: torch.device, seed: int,
        shares: Mapping[Kind, float] = KIND_SHARES, one_kind: bool = False, toned: float = 0.35,
    ) -> None:  # fmt: skip
        self.pool, self.size, self.crop, self.device = pool, size, crop, device
        self.shares, self.one_kind, self.toned = shares, one_kind, toned
        self.choices = torch.Generator().manual_seed(seed)
        self.damage = torch.Generator(device).manual_seed(seed + 1)
        cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if cuda else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def state(self) -> dict[str, Tensor]:
        return {"choices": self.choices.get_state(), "damage": self.damage.get_state().cpu()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.choices.set_state(state["choices"].cpu())
        self.damage.set_state(state["damage"].cpu())

    def _kinds(self) -> tuple[Kind, ...]:
        kinds = self._camera_kinds()
        sent_as_jpeg = float(torch.rand(1, generator=self.choices)) < UPLOAD_JPEG
        return (*kinds, Kind.JPEG) if sent_as_jpeg and kinds != (Kind.CLEAN,) else kinds

    def _camera_kinds(self) -> tuple[Kind, ...]:
        single = list(self.shares)
        shares = torch.tensor([*self.shares.values(), 1 - sum(self.shares.values())])
        choice = int(torch.multinomial(shares, 1, generator=self.choices))
        if choice < len(single):
            return (single[choice],)
        damaged = [kind for kind in single if kind is not Kind.CLEAN]
        pair = torch.multinomial(torch.ones(len(damaged)), 2, generator=self.choices).tolist()
        return tuple(damaged[index] for index in pair)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if not self.stream:
                yield self._drawn()
                continue
            with torch.cuda.stream(self.stream):  # beside the step that still runs
                batch = self._drawn()
            training = torch.cuda.current_stream(self.device)
            training.wait_stream(self.stream)
            for tensor in (batch.degraded, batch.clean, batch.rate):
                tensor.record_stream(training)
            yield batch

    def _drawn(self) -> Batch:
        clean = tone_jittered(self.pool.crops(self.size, self.crop, self.choices), self.choices, self.toned)
        kinds = [self._kinds()] * self.size if self.one_kind else [self._kinds() for _ in range(self.size)]
        # Stratified: every batch spreads over the rate points.
        start = torch.rand(1, generator=self.choices)
        spread = (torch.arange(self.size) + start) / self.size
        rate = (spread * RATE_POINTS).long().clamp_max(RATE_POINTS - 1)
        rate = rate[torch.randperm(self.size, generator=self.choices)].to(self.device)
        degraded, added_mse = degrade_measured(clean, kinds, self.damage, TRAINING)
        return Batch(degraded, clean, rate, kinds, added_mse)
