"""`model_store.training.retouch` and the pictures that it draws."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model_store.degradations import Kind
from model_store.training import retouch
from model_store.training.drawings import Drawings
from model_store.training.weights import keep_weights, read_weights
from service.codec.config import CONFIGS, LAMBDA_RANGE
from service.codec.model import TrainableCodec
from tests.codec.test_model import TINY


def drawn(seed: int, count: int, size: int) -> torch.Tensor:
    return Drawings(torch.device("cpu")).crops(count, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [16, 64, 320])
def test_drawings_are_pictures_of_whole_levels(size: int) -> None:
    pictures = drawn(1, 12, size)
    assert pictures.shape == (12, 3, size, size)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    assert torch.equal((pictures * 255).round() / 255, pictures)


def test_drawings_are_drawn_again_from_the_same_seed_and_differ() -> None:
    first = drawn(1, 40, 64)
    assert torch.equal(first, drawn(1, 40, 64))
    assert not torch.equal(first, drawn(2, 40, 64))
    spread = first.std((2, 3)).amax(1)
    assert 5 < int((spread == 0).sum()) < 20  # plain ones
    assert int((spread > 0.05).sum()) > 5
    middle = first.mean((1, 2, 3))
    assert middle.min() < 0.25
    assert middle.max() > 0.75


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of a tiny model, and a clock whose seconds are steps."""
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    ticks = iter(range(10**6))
    monkeypatch.setattr(retouch, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(retouch, "_LOG_EVERY", 2)
    torch.manual_seed(0)
    path = tmp_path / "start.pt"
    torch.save(
        {"ema": TrainableCodec(TINY).state_dict(), "record": dict(zip(("lambda_low", "lambda_high"), LAMBDA_RANGE))},
        path,
    )
    return path


def retouched(start: Path, photos: Path, run: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The weights after some steps of a high rate, and how far the latents of photographs moved at last."""
    output = retouch.retouch(
        start,
        photos,
        run / "checkpoint.pt",
        size="tiny",
        minutes=0.3,
        learn=[Kind.RAIN],
        lr=3e-3,
        batch=2,
        crop=64,
        seed=1,
    )
    lines = [json.loads(line) for line in (run / "retouch.jsonl").read_text().splitlines()]
    return read_weights(output), lines[-1]["held"]


def test_only_the_encoder_learns_and_is_held_to_its_latents(
    start: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_weights(start)
    after, held = retouched(start, photos, tmp_path / "held")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("g_a.") for name in changed)
    keep_weights(tmp_path / "held" / "checkpoint.pt", tmp_path / "kept.safetensors")  # a run can start from it
    monkeypatch.setattr(retouch, "HOLD", 0.0)
    _, free = retouched(start, photos, tmp_path / "free")
    assert held < 0.5 * free
