"""`service.codec.refine`: fewer bits for the same picture, whoever decodes it; and only where that can be known."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from model_store.images import psnr
from service.codec import refine, shipped
from service.codec.bitstream import Degradation, DegradationKind
from service.codec.config import CONFIGS, MOST_EFFORT
from service.codec.refine import Refinement, Rounded, steps_of, trust
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


@pytest.mark.parametrize("rate", [1, 2])
def test_noisy_photos_are_not_refined_for_what_a_small_rate_point_leaves_of_them(
    engine: Engine, bikes: Photo, monkeypatch: pytest.MonkeyPatch, rate: int
) -> None:
    guided = cost(engine, noisy(bikes, 25), bikes, rate, 4)
    monkeypatch.setattr(shipped, "GUIDE", 0)
    assert guided < cost(engine, noisy(bikes, 25), bikes, rate, 4)


def test_a_large_photo_is_refined_window_by_window(
    engine: Engine, parrots: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = np.concatenate([parrots, np.rot90(parrots, 2)])
    none, whole = (cost(engine, large, large, 5, effort) for effort in (0, 3))
    monkeypatch.setattr(refine, "_WINDOW", 12)
    cut = cost(engine, large, large, 5, 3)
    assert cut < none - 0.5 * (none - whole) < none


@pytest.mark.parametrize("length", [1, 47, 48, 49, 200, 448])
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
    for wrong in (-1, MOST_EFFORT + 1):
        with pytest.raises(ValueError, match=f"effort from 0 to 8, got {wrong}"):
            engine.encode([EncodeJob(parrots, 4, effort=wrong)])


@pytest.mark.parametrize(("sigma", "rate"), [(0, 4), (15, 4), (15, 2)])
def test_steps_are_announced_and_may_end_the_work(engine: Engine, parrots: Photo, sigma: int, rate: int) -> None:
    class Counting(Watch):
        foreseen, done, most = engine.default.codec.steps, 0, 10**6

        def step(self) -> None:
            self.done += 1
            if self.done == self.most:
                raise TimeoutError("enough")

        def more(self, steps: int) -> None:
            self.foreseen += steps

    job, watch = EncodeJob(noisy(parrots, sigma), rate, effort=3), Counting()
    (stream,) = engine.encode([job], watch=watch)
    assert watch.done == watch.foreseen >= engine.default.codec.steps + steps_of(8, 12, 3)
    watch.done, watch.most = 0, watch.foreseen - 1
    with pytest.raises(TimeoutError, match="enough"):
        engine.encode([job], watch=watch)
    assert engine.encode([job]) == [stream]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 17)])
def test_small_photos_can_be_refined(engine: Engine, parrots: Photo, size: tuple[int, int]) -> None:
    streams = engine.encode([EncodeJob(parrots[: size[0], : size[1]], rate, effort=2) for rate in (1, 8)])
    assert {back.shape for back in engine.decode(streams)} == {(*size, 3)}


def test_what_the_decoder_clips_is_no_error(engine: Engine) -> None:
    """Black bars on white: g_s rings beyond both, which costs nothing."""
    bars = np.full((112, 112, 3), 255, np.uint8)
    bars[:, ::7] = 0
    none, four = (cost(engine, bars, bars, 6, effort) for effort in (0, 4))
    assert four < 0.8 * none


def test_the_way_back_is_the_same_without_what_was_kept(codec: ShippedCodec) -> None:
    torch.manual_seed(0)
    plain = Synthesis(codec.config).requires_grad_(False)
    y, rate = torch.randn(2, codec.config.latents, 3, 4), torch.tensor([1, 6])
    for dtype in (torch.float32, torch.bfloat16):
        twin = refine.recomputed(plain, dtype)
        seen = y.clone().requires_grad_()
        out = twin(seen, rate)
        signs = torch.ones_like(out)
        twice = [torch.autograd.grad(out, seen, signs, retain_graph=True)[0] for _ in range(2)]
        own = y.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            expected = plain(own, rate)
        (gradient,) = torch.autograd.grad(expected, own, signs)
        assert torch.allclose(out, expected, atol=1e-5)
        assert torch.equal(*twice)
        assert torch.allclose(twice[0], gradient, rtol=1e-3, atol=1e-5)
    weights = [{one.data_ptr() for one in g_s.state_dict().values()} for g_s in (plain, twin)]
    assert weights[0] == weights[1]


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

    kept = Refinement(g_s)(y, torch.rand(1, 3, 32, 32), rate, 6, rounded, lambda: None)
    moved = [(tried != y).sum(1) for tried in asked[1:]]
    assert all((counts <= refine._STEPS).all() for counts in moved)  # each round begins where the first did,
    assert 0 < moved[-1].sum() < moved[0].sum()  # and is warier
    assert kept is y


def test_rounds_end_where_nothing_saves_anything() -> None:
    g_s = Synthesis(CONFIGS["edge"]).eval().requires_grad_(False)
    y, rate, told = torch.zeros(1, 192, 2, 50), torch.tensor([0]), []

    def rounded(y: Tensor) -> Rounded:
        return Rounded(y, y, torch.full_like(y, 1e-3), torch.ones_like(y, dtype=torch.bool))  # a step costs thousands

    kept = Refinement(g_s)(y, torch.rand(1, 3, 32, 800), rate, 8, rounded, lambda: told.append(len(told)))
    assert kept is y
    assert len(told) == steps_of(2, 50, 8)


def test_what_g_s_cannot_tell_is_not_refined() -> None:
    y = torch.zeros(1, 4, 2, 2)

    def broken(y: Tensor, _: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(y[:, :3], scale_factor=16) * math.nan

    def rounded(y: Tensor) -> Rounded:
        return Rounded(y, y, torch.ones_like(y), torch.ones_like(y, dtype=torch.bool))

    assert Refinement(broken)(y, torch.rand(1, 3, 32, 32), torch.tensor([0]), 2, rounded, lambda: None) is y


def test_the_probe_finds_the_curvature_of_each_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a linear g_s, whose J^T J is known, in windows that overlap."""
    torch.manual_seed(0)
    weight = 0.01 * torch.randn(3, 3, 256)

    def linear(y: Tensor, _: Tensor) -> Tensor:
        out = torch.einsum("bnhw,cnk->bchwk", y, weight).unflatten(-1, (16, 16))
        return 0.5 + out.permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 16 * y.shape[2], 16 * y.shape[3])

    monkeypatch.setattr(refine, "_WINDOW", 24)
    y, target = torch.zeros(1, 3, 40, 40), torch.full((1, 3, 640, 640), 0.5)
    at = Rounded(y, y, y, y > 0)
    distortion, gradient, probed = Refinement(linear)._look(at, target, torch.tensor([0]), lambda: None, probe=True)
    assert distortion == 0
    assert not gradient.any()
    exact = weight.square().sum((0, 2)) / target.numel()
    assert torch.allclose(probed[0, :, 0, 0], exact, rtol=0.1)


def test_error_and_gradient_of_windows_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    y, target = torch.randn(1, 3, 40, 70), torch.rand(1, 3, 640, 1120)

    def repeated(y: Tensor, _: Tensor) -> Tensor:
        return 0.5 + 0.3 * y.repeat_interleave(16, 2).repeat_interleave(16, 3)

    at = Rounded(y, y, y, y > 0)
    monkeypatch.setattr(refine, "_WINDOW", 24)
    distortion, gradient, _ = Refinement(repeated)._look(at, target, torch.tensor([0]), lambda: None)
    own = y.clone().requires_grad_()
    whole = (repeated(own, own).clamp(0, 1) - target).square().mean()
    assert distortion == pytest.approx(float(whole.detach()), rel=1e-5)
    clipped = (repeated(y, y) - 0.5).abs() > 0.5
    assert clipped.any()
    assert torch.allclose(gradient, torch.autograd.grad(whole, own)[0], rtol=1e-3, atol=1e-9)
