"""`model_store.degradations`: every kind harms, none breaks, and the same seed harms alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model_store.degradations import (
    EVALUATION,
    MAKERS,
    TRAINING,
    Kind,
    Ranges,
    degrade,
    degrade_measured,
    filter_each,
    line_kernels,
    lines,
    to_linear,
    to_srgb,
)
from service.engine import Photo


def clean(parrots: Photo, count: int = 4) -> torch.Tensor:
    x = torch.from_numpy(parrots.copy()).permute(2, 0, 1).float() / 255
    return torch.stack([x.roll(50 * k, 2)[:, :160, :176] for k in range(count)])


@pytest.mark.parametrize("kind", list(MAKERS))
@pytest.mark.parametrize("ranges", [TRAINING, EVALUATION])
def test_every_kind_harms_and_stays_an_8_bit_photo(parrots: Photo, kind: Kind, ranges: Ranges) -> None:
    x = clean(parrots)
    out = degrade(x, [(kind,)] * 4, torch.Generator().manual_seed(1), ranges)
    assert out.shape == x.shape
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert torch.allclose(out * 255, (out * 255).round(), atol=1e-3)
    error = (out - x).square().mean((1, 2, 3))
    assert float(error.min()) > 1e-5
    assert float(error.max()) < 0.5


def test_photos_get_their_own_kinds_and_clean_ones_none(parrots: Photo) -> None:
    x = clean(parrots)
    kinds = [(Kind.CLEAN,), (Kind.RAIN,), (), (Kind.HAZE, Kind.JPEG)]
    out = degrade(x, kinds, torch.Generator().manual_seed(2), TRAINING)
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[2], x[2])
    assert not torch.equal(out[1], x[1])
    assert not torch.equal(out[3], x[3])


def test_the_sensor_sees_what_came_through_the_lens() -> None:
    grey, seed = torch.full((2, 3, 96, 96), 0.5), torch.Generator().manual_seed(6)
    out, added_mse = degrade_measured(grey, [(Kind.BLUR, Kind.NOISE), (Kind.HAZE, Kind.NOISE)], seed, TRAINING)
    for noisy, told in zip(out, added_mse):
        spread = (noisy - noisy.mean((1, 2), keepdim=True)).square().mean()
        assert float(spread) == pytest.approx(told[Kind.NOISE], rel=0.1)  # nothing has blurred or veiled it


def test_the_same_seed_gives_the_same_harm(parrots: Photo) -> None:
    x = clean(parrots)
    for kind in MAKERS:
        kinds = [(kind,)] * len(x)
        one, two = (degrade(x, kinds, torch.Generator().manual_seed(3), TRAINING) for _ in range(2))
        assert torch.equal(one, two), kind
        assert not torch.equal(one, degrade(x, kinds, torch.Generator().manual_seed(4), TRAINING)), kind


def test_srgb_and_linear_light_are_inverse() -> None:
    x = torch.linspace(0, 1, 256)
    assert torch.allclose(to_srgb(to_linear(x)), x, atol=1e-5)
    assert float(to_linear(torch.tensor(0.5))) == pytest.approx(0.21404, abs=1e-4)


def test_noise_has_the_deviation_it_says() -> None:
    x = torch.full((1, 3, 128, 128), 0.5)
    sigma = 25 / 255
    out = degrade(x, [(Kind.NOISE,)], torch.Generator().manual_seed(5), Ranges(noise=(sigma, sigma)))
    assert float(out.std()) == pytest.approx(sigma, rel=0.03)


@pytest.mark.parametrize("level", [0.2, 0.6])
def test_a_sensor_has_the_noise_that_light_makes(level: float) -> None:
    """Its variance in linear light is that of reading plus what grows with the light; demosaicing spreads it."""
    read, shot = 0.02, 0.01
    grey = to_srgb(torch.full((1, 3, 256, 256), level))
    bare, spread = (
        to_linear(degrade(grey, [(Kind.SENSOR_NOISE,)], torch.Generator().manual_seed(7),
                          Ranges(read=(read, read), shot=(shot, shot), mosaic=share))) - level
        for share in (0.0, 1.0)
    )  # fmt: skip
    assert float(bare.square().mean()) == pytest.approx(read**2 + shot * level, rel=0.03)
    assert float(spread.square().mean()) < 0.7 * float(bare.square().mean())
    for noise, alike in ((bare, 0.0), (spread, 0.55)):  # of neighbours
        neighbours = (noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()
        assert float(neighbours) == pytest.approx(alike, abs=0.15)


def test_low_light_is_less_light() -> None:
    grey = to_srgb(torch.full((1, 3, 256, 256), 0.8))
    out = degrade(grey, [(Kind.LOW_LIGHT,)], torch.Generator().manual_seed(7), Ranges(light=(0.25, 0.25), mosaic=0.0))
    assert float(to_linear(out).mean()) == pytest.approx(0.2, rel=0.02)
    assert float((out - out.mean()).square().mean()) > 1e-5


def test_blur_spreads_what_there_is(parrots: Photo) -> None:
    x = clean(parrots, 12)
    flat = degrade(torch.full_like(x, 0.5), [(Kind.BLUR,)] * 12, torch.Generator().manual_seed(9), TRAINING)
    assert torch.allclose(flat, torch.full_like(x, 0.5), atol=1 / 255)
    out = degrade(x, [(Kind.BLUR,)] * 12, torch.Generator().manual_seed(9), TRAINING)
    assert torch.allclose(out.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=0.01)
    for before, after in zip(x, out):  # less detail, at its place
        assert after.diff(dim=2).square().mean() < 0.9 * before.diff(dim=2).square().mean()
        assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.8


def test_lines_by_fourier_transform_are_those_of_the_kernels() -> None:
    drops = torch.zeros(2, 1, 64, 80)
    drops[0, 0, 30, 40], drops[1, 0, 20:23, 50] = 1.0, 0.5
    length, width, angle = (torch.tensor(of).reshape(2, 1, 1, 1) for of in ((9.0, 14.0), (0.7, 1.5), (0.3, -1.2)))
    direct = filter_each(drops, line_kernels(length, width, angle))
    assert torch.allclose(lines(drops, length, width, angle), direct, atol=1e-4)


@pytest.mark.parametrize("share", ["sheet", "strokes"])
def test_rain_that_is_light_darkens_nothing(parrots: Photo, share: str) -> None:
    x = clean(parrots, 12)
    ranges = Ranges(**{share: 1.0})  # type: ignore[arg-type]
    out = degrade(x, [(Kind.RAIN,)] * 12, torch.Generator().manual_seed(8), ranges)
    added = out - x
    assert float(added.min()) > -1 / 255
    free = (out < 1).all(1, keepdim=True)  # where it does not clip it is grey
    assert float(((added - added.mean(1, keepdim=True)).abs() * free).max()) < 1.5 / 255


def test_jpeg_loses_what_libjpeg_loses(parrots: Photo) -> None:
    """Our JPEG at a quality is within 1 dB of the real one."""
    from model_store.images import psnr
    from service.imaging import read_photo
    from tests.conftest import image_bytes

    for quality in (15, 40, 75):
        ranges = Ranges(jpeg_quality=(quality, quality))
        x = torch.from_numpy(parrots.copy()).permute(2, 0, 1)[None].float() / 255
        ours = degrade(x, [(Kind.JPEG,)], torch.Generator().manual_seed(6), ranges)
        pixels = (ours[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        real = read_photo(image_bytes(parrots, "JPEG", quality=quality), 10**6)
        assert psnr(np.asarray(pixels), parrots) == pytest.approx(psnr(real, parrots), abs=1.0)
