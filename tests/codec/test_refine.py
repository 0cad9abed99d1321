"""`service.codec.refine`: fewer bits for the same picture, whoever decodes it; and only where that can be known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from model_store.images import psnr
from service.codec import refine
from service.codec.bitstream import Degradation, DegradationKind
from service.codec.config import CONFIGS
from service.codec.refine import MOST_ROUNDS, Refinement, Rounded, steps_of, trust
from service.codec.shipped import ShippedCodec, Watch
from service.codec.transforms import Synthesis, rate_lambda
from service.engine import EncodeJob, Engine, Photo
from tests.conftest import noisy


def cost(engine: Engine, photo: Photo, clean: Photo, rate: int, effort: int) -> float:
    """lambda D + R in bits per pixel, from the file's bytes and the restored photo."""
    (stream,) = engine.encode([EncodeJob(photo, rate, effort=effort)])
    (back,) = engine.decode([stream])
    mse = 10 ** (-psnr(back, clean) / 10)
    pixels = photo.shape[0] * photo.shape[1]
    return float(rate_lambda(torch.tensor([rate - 1]))) * mse + 8 * len(stream.to_bytes()) / pixels


@pytest.mark.parametrize("sigma", [0, 15])
@pytest.mark.parametrize("rate", [2, 6])
def test_effort_pays_in_bytes_and_pictures(engine: Engine, parrots: Photo, rate: int, sigma: int) -> None:
    photo = noisy(parrots, sigma) if sigma else parrots
    none, one, four = (cost(engine, photo, parrots, rate, effort) for effort in (0, 1, 4))
    assert four < one < none


def test_a_large_photo_is_refined_window_by_window(
    engine: Engine, parrots: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cost(engine, parrots, parrots, 5, 2)
    monkeypatch.setattr(refine, "_WINDOW", 5)
    monkeypatch.setattr(refine, "_MARGIN", 2)
    cut, none = (cost(engine, parrots, parrots, 5, effort) for effort in (2, 0))
    assert cut < none - 0.5 * (none - whole)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 448])
def test_windows_cover_every_position_once(length: int) -> None:
    windows = refine._windows(length)
    assert windows[0].inner.start == 0
    assert windows[-1].inner.stop == length
    assert all(one.inner.stop == other.inner.start for one, other in pairwise(windows))
    positions = torch.arange(length)
    for window in windows:
        assert torch.equal(positions[window.seen][window.within], positions[window.inner])
        assert window.seen.stop - window.seen.start <= refine._WINDOW + 2 * refine._MARGIN


def test_the_photo_is_trusted_as_far_as_the_report_allows() -> None:
    def found(**kinds: float) -> tuple[Degradation, ...]:
        return tuple(Degradation(DegradationKind[name.upper()], strength) for name, strength in kinds.items())

    assert trust(found(clean=0.6)) == 1
    # Strengths of white noise with a deviation of 5, 20 and 50 levels: (40 - PSNR) / 30
    weak, even, strong = (trust(found(noise=(40 + 20 * np.log10(s / 255)) / 30)) for s in (5, 20, 50))
    assert 1 > weak > 0.9
    assert even == pytest.approx(0.5, abs=1e-6)
    assert 0.2 > strong > 0
    assert trust(found(noise=0.47, jpeg=0.47)) < trust(found(jpeg=0.47)) == trust(found(noise=0.47))
    for other in (found(rain=0.4), found(noise=0.4, rain=0.3), found(blur=0.1), ()):
        assert trust(other) == 0


def test_what_has_another_flaw_is_coded_as_without(engine: Engine, parrots: Photo) -> None:
    dark = (parrots * 0.15).astype(np.uint8)
    (stream,), (refined,) = (engine.encode([EncodeJob(dark, 4, effort=effort)]) for effort in (0, 3))
    assert "clean" not in {one.kind.label for one in stream.degradations}
    assert refined == stream


def test_a_copy_is_coded_as_it_was(engine: Engine, parrots: Photo) -> None:
    (stream,) = engine.encode([EncodeJob(parrots, 6, effort=2)])
    (copy,) = engine.decode([stream])
    plain, (refined,) = engine.encode([EncodeJob(copy, 6)]), engine.encode([EncodeJob(copy, 6, effort=2)])
    assert plain == [refined]
    (again,) = engine.decode(plain)
    assert psnr(again, parrots) > psnr(copy, parrots) - 0.25


def test_photos_of_one_batch_have_efforts_of_their_own(engine: Engine, parrots: Photo) -> None:
    efforts = (0, 2, 0, 1)
    streams = engine.encode([EncodeJob(parrots, 4, effort=effort) for effort in efforts])
    assert streams[0] == streams[2]
    assert len({stream.payload for stream in streams}) == 3
    for wrong in (-1, MOST_ROUNDS + 1):
        with pytest.raises(ValueError, match=f"effort from 0 to 8, got {wrong}"):
            engine.encode([EncodeJob(parrots, 4, effort=wrong)])


def test_steps_are_announced_and_told(engine: Engine, parrots: Photo) -> None:
    class Counting(Watch):
        foreseen = done = 0

        def step(self) -> None:
            self.done += 1

        def more(self, steps: int) -> None:
            self.foreseen += steps

    watch = Counting()
    engine.encode([EncodeJob(parrots, 4, effort=3)], watch=watch)
    assert watch.foreseen == steps_of(-(-parrots.shape[0] // 16), -(-parrots.shape[1] // 16), 3) == 4
    assert watch.done == engine.default.codec.steps + 4


def test_what_gets_dearer_is_not_kept() -> None:
    """A prior to which every step costs a fortune that its own estimate does not show."""
    torch.manual_seed(0)
    config = CONFIGS["edge"]
    g_s = Synthesis(config).eval().requires_grad_(False)
    y, rate = torch.randn(1, config.latents, 2, 2), torch.tensor([4])
    asked: list[Tensor] = []

    def rounded(y: Tensor) -> Rounded:
        asked.append(y)
        symbols = torch.zeros_like(y) if len(asked) == 1 else torch.full_like(y, 50.0)
        return Rounded(y.round(), symbols, torch.full_like(y, 10.0), torch.ones_like(y, dtype=torch.bool))

    kept = Refinement(g_s, torch.float32)(y, torch.rand(1, 3, 32, 32), rate, 2, rounded, lambda: None)
    assert len(asked) == 3
    assert not torch.equal(asked[1], y)
    assert kept is y


def test_the_probe_finds_the_curvature_of_each_channel(codec: ShippedCodec) -> None:
    """Of a linear g_s, whose J^T J is known."""

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.randn(3, 3, 256)

        def forward(self, y: Tensor, _: Tensor) -> Tensor:
            out = torch.einsum("bnhw,cnk->bchwk", y, self.weight).unflatten(-1, (16, 16))
            return out.permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 16 * y.shape[2], 16 * y.shape[3])

    linear, y = Linear(), torch.zeros(1, 3, 40, 40)
    target = torch.zeros(1, 3, 640, 640)
    rate = torch.tensor([0])
    look = Refinement(linear, torch.float32)._look  # type: ignore[arg-type]
    distortion, gradient, probed = look(y, target, rate, True, True, lambda: None)
    assert distortion == 0
    assert not gradient.any()
    exact = linear.weight.square().sum((0, 2)) / target.numel()
    assert torch.allclose(probed[0, :, 0, 0], exact, rtol=0.1)
