"""`model_store.training.retouch` and the pictures that it draws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model_store.degradations import Kind
from model_store.training import retouch
from model_store.training.batches import KIND_SHARES, Batches
from model_store.training.drawings import DRAWN_SHARES, Drawings
from model_store.training.weights import weights_to_start_from
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
    """Weights of a tiny model, and a clock of two ticks a step."""
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    ticks = iter(range(10**6))
    monkeypatch.setattr(retouch, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(retouch, "_LOG_EVERY", 2)
    torch.manual_seed(0)
    path = tmp_path / "start.pt"
    weights, record = TrainableCodec(TINY).state_dict(), dict(zip(("lambda_low", "lambda_high"), LAMBDA_RANGE))
    torch.save({"ema": weights, "record": record}, path)
    return path


def retouched(
    start: Path, photos: Path, run: Path, *learn: Kind, held_to: Path | None = None, hold: float = retouch.HOLD
) -> list[dict[str, float]]:
    """The log of some steps of a high rate."""
    retouch.retouch(
        start, photos, run / "checkpoint.pt", size="tiny", minutes=0.3, learn=learn, held_to=held_to, hold=hold,
        lr=3e-3, batch=2, crop=64, seed=1,
    )  # fmt: skip
    return [json.loads(line) for line in (run / "retouch.jsonl").read_text().splitlines()]


def test_only_the_encoder_learns_and_is_held_to_its_latents(start: Path, photos: Path, tmp_path: Path) -> None:
    held = retouched(start, photos, tmp_path / "held")
    before, after = (weights_to_start_from(path, TINY) for path in (start, tmp_path / "held" / "checkpoint.pt"))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("g_a.") and not name.startswith("g_a.gain") for name in changed)
    free = retouched(start, photos, tmp_path / "free", hold=0)
    assert held[-1]["held"] < 0.5 * free[-1]["held"]


def test_what_is_learned_is_not_held(
    start: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Mapping[Kind, float]] = []
    toned: list[float] = []

    class Told(Batches):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            asked.append(self.shares)
            toned.append(self.toned)

    monkeypatch.setattr(retouch, "Batches", Told)
    retouched(start, photos, tmp_path / "rain", Kind.RAIN, Kind.RAIN)
    held, damaged, drawn = asked
    assert held.keys() == KIND_SHARES.keys() - {Kind.RAIN}
    assert sum(held.values()) == pytest.approx(sum(KIND_SHARES.values()))
    assert damaged == {Kind.RAIN: 1}
    assert toned[0] > toned[1]  # a dim scene is no dark photo
    assert drawn == DRAWN_SHARES
    record = torch.load(tmp_path / "rain" / "checkpoint.pt", weights_only=True)["record"]
    assert record["learn"] == "rain"
    assert all(isinstance(value, str | int | float) for value in record.values())  # as a store's index has them


def test_a_retouch_goes_on_and_is_held_to_what_came_before_it(start: Path, photos: Path, tmp_path: Path) -> None:
    first = tmp_path / "first" / "checkpoint.pt"
    retouched(start, photos, first.parent)
    state = torch.load(first, weights_only=True)
    state["ema"]["g_a.gain.log_high"] += 1
    torch.save(state, first)
    again = tmp_path / "again" / "checkpoint.pt"
    log = retouched(first, photos, again.parent, held_to=start)
    before, after = weights_to_start_from(start, TINY), weights_to_start_from(again, TINY)
    assert torch.equal(after["g_a.gain.log_high"], before["g_a.gain.log_high"])  # which the entropy model knows
    anew = retouched(first, photos, tmp_path / "anew")
    assert log[0]["held"] > anew[0]["held"]  # of g_a as it begins, by how far it had moved
    record = torch.load(again, weights_only=True)["record"]
    assert (record["retouched"], record["held_to"]) == ("first/checkpoint.pt", f"{tmp_path.name}/start.pt")


def test_what_cannot_be_learned_is_refused(start: Path, photos: Path, tmp_path: Path) -> None:
    for learn in ([Kind.CLEAN], [Kind.JPEG], retouch.LEARNABLE):
        with pytest.raises(ValueError, match="expected kinds of noise, "):
            retouched(start, photos, tmp_path, *learn)
    with pytest.raises(ValueError, match="expected another output"):
        retouch.retouch(start, photos, start, size="tiny", minutes=0.1, crop=64)
