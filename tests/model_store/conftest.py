"""Photos to train on, and short runs on them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from model_store.training import loop
from model_store.training import step as one_step
from model_store.training.loop import train
from model_store.training.loss import balanced_distortion
from model_store.training.schedule import Schedule
from service.codec.config import CONFIGS, CodecConfig
from tests.codec.test_model import TINY
from tests.conftest import DATA


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos" / "nested"
    folder.mkdir(parents=True)
    for name in ("parrots", "bikes"):
        with Image.open(DATA / f"{name}.png") as image:
            image.save(folder / f"{name}.png")
    return folder.parent


def run(
    photos: Path,
    folder: Path,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    crash_at: int | None = None,
    config: CodecConfig = TINY,
    seed: int | None = 1,
    tick: float = 1.0,
    **options: Any,
) -> Path:
    """Train for a number of steps: every step is made to take a second of the schedule's time, or `tick` of them."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: tick * next(ticks)))
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    monkeypatch.setitem(CONFIGS, "tiny", config)
    if crash_at is not None:
        calls = iter(range(10**6))

        def failing(mse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            if next(calls) == crash_at:
                raise KeyboardInterrupt
            return balanced_distortion(mse, weight)

        monkeypatch.setattr(one_step, "balanced_distortion", failing)
    schedule = Schedule(minutes=steps / 60, lr=1e-3, prior_lr=1e-3, steady=0.5)
    try:
        return train(
            photos=photos, run=folder, size="tiny", schedule=schedule, batch=2, crop=64, seed=seed, device="cpu",
            compiled=False, **options,
        )  # fmt: skip
    finally:
        monkeypatch.undo()
