"""`model_store.training.soup`: shares that learn what is better, block by block."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model_store.training.soup import Soup, soup
from model_store.training.weights import read_weights
from service.codec.config import CONFIGS
from service.codec.model import TrainableCodec
from tests.codec.test_model import TINY
from tests.model_store.conftest import run


def test_shares_give_the_weights_between_and_gradients_of_shares() -> None:
    torch.manual_seed(0)
    models = [TrainableCodec(TINY) for _ in range(3)]
    start, *others = ({name: value.clone() for name, value in one.state_dict().items()} for one in models)
    mixed = Soup(model := models[0], start, others)
    shares = torch.zeros_like(mixed.shares)
    block = mixed.blocks.index("g_s.head")
    shares[1, block] = 0.25
    mixed.apply(shares)
    for name, value in model.named_parameters():
        wanted = start[name].lerp(others[1][name], 0.25) if name.startswith("g_s.head") else start[name]
        torch.testing.assert_close(value, wanted)
    head = dict(model.named_parameters())["g_s.head.conv.weight"]
    (1e-3 * head.sum()).backward()
    mixed.accumulate_grad()
    assert mixed.shares.grad is not None
    slope = 1e-3 * (others[1]["g_s.head.conv.weight"] - start["g_s.head.conv.weight"]).sum()
    torch.testing.assert_close(mixed.shares.grad[1, block], slope)
    assert mixed.shares.grad.count_nonzero() == 2  # one of each of the others


def test_shares_go_towards_the_better_weights(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = run(photos, tmp_path / "good", 6, monkeypatch)
    state = torch.load(good, weights_only=True)
    for kind in ("model", "ema"):
        state[kind]["g_s.head.conv.bias"] = state[kind]["g_s.head.conv.bias"] + 0.3  # too bright
    (tmp_path / "bright").mkdir()
    torch.save(state, bright := tmp_path / "bright" / "checkpoint.pt")
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    output = tmp_path / "soup" / "checkpoint.pt"
    ticks = iter(range(10**6))
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))  # a second per batch
    monkeypatch.setattr("model_store.training.soup.time", clock)
    shares = soup(bright, [good], photos, output, minutes=1, lr=0.1, batch=2, crop=64, device="cpu", compiled=False)
    monkeypatch.undo()
    assert shares["g_s.head"][0] > 0.1
    assert all(values == [0.0] for block, values in shares.items() if block != "g_s.head")  # they are alike
    name = "g_s.head.conv.bias"
    was, better, written = (read_weights(path)[name] for path in (bright, good, output))
    torch.testing.assert_close(written, was.lerp(better, shares["g_s.head"][0]))
