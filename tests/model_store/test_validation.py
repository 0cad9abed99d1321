"""`model_store.training.validation`: what it sees of the photos and how it compares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model_store.evaluation.rate_distortion import Curve
from model_store.training import validation
from model_store.training.weights import weights_to_start_from
from service.codec.config import EDGE
from service.codec.model import TrainableCodec

STATE = Path(validation.__file__).parent / "states" / "edge.safetensors"


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Four photos of Kodak and a pair of the others, the degraded ones black."""
    photo = np.random.default_rng(1).integers(0, 255, (64, 90, 3), np.uint8)
    for name, files in (
        ("kodak", ("a", "b", "c", "d")),
        ("rain", ("1_clean", "1_rain")),
        ("cc15", ("1_clean", "1_noisy")),
    ):
        (tmp_path / name).mkdir()
        for file in files:
            Image.fromarray(photo * (file[2:] in ("", "clean"))).save(tmp_path / name / f"{file}.png")
    return tmp_path


def test_every_case_is_seen_at_its_rates(sets: Path) -> None:
    model = TrainableCodec(EDGE)
    model.load_state_dict(weights_to_start_from(STATE, EDGE))
    found = validation.validate(model, sets)
    assert found["kodak noise-25"].setting == (2, 4, 6, 8)
    assert len(found) == len(validation.CASES)
    for curve in found.values():
        assert np.isfinite(curve.psnr).all()
        assert min(curve.bpp) > 0
    assert found["rain pairs"].psnr[0] < 10 < found["kodak clean"].psnr[0], "against the clean one"
    assert found["rain pairs"].bpp[1] < found["kodak clean"].bpp[1]  # its photo is black: rate 7 below rate 4


@pytest.mark.parametrize(("condition", "every", "count"), [("clean", 1, 4), ("noise-25", 3, 2)])
def test_photos_are_cut_to_their_centre(
    sets: Path, monkeypatch: pytest.MonkeyPatch, condition: str, every: int, count: int
) -> None:
    monkeypatch.setattr(validation, "CROP", (32, 500))
    seen = list(validation.photos_of(sets, validation.Case("kodak", condition, every, (4,))))
    whole = np.asarray(Image.open(sets / "kodak" / "a.png"))
    assert len(seen) == count
    for degraded, clean in seen:
        assert (clean == whole[16:48, 5:85]).all()
        assert (degraded == clean).all() == (condition == "clean")
    ((_, seen_whole), *_) = validation.photos_of(sets, validation.Case("kodak", condition, every, (4,), whole=True))
    assert (seen_whole == whole[:, 5:85]).all()


def test_a_curve_of_twice_the_bits_is_a_hundred_percent_worse() -> None:
    curve = Curve((0.1, 0.2, 0.4, 0.8), (28.0, 30.0, 32.0, 34.0), (2, 4, 6, 8))
    double = replace(curve, bpp=tuple(2 * bpp for bpp in curve.bpp))
    told = "-2.00 -2.00 -2.00 -2.00 dB at its bits; BD-rate +100.0%; 2: +0.00 dB +100.0%"
    assert validation.compared(double, curve).startswith(told)
    two = Curve(curve.bpp[:2], curve.psnr[:2], (5, 7))
    assert validation.compared(two, replace(two, psnr=(27.0, 30.5))) == "5: +1.00 dB +0.0%, 7: -0.50 dB +0.0%"


def test_a_file_of_an_earlier_validation_is_compared_with(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = Curve((0.1, 0.2, 0.4), (28.0, 30.0, 32.0), (2, 4, 6))
    monkeypatch.setattr(validation, "validate", lambda model, root: {"kodak clean": curve})
    first = tmp_path / "first.json"
    for more in (["--output", str(first)], ["--against", str(first)]):
        monkeypatch.setattr("sys.argv", ["validation", str(STATE), "--photos", str(sets), *more])
        validation.main()
    absolute, relative = capsys.readouterr().out.splitlines()
    assert absolute == "kodak clean: 28.00 dB at 0.100, 30.00 dB at 0.200, 32.00 dB at 0.400"
    assert relative.startswith("kodak clean: +0.00 +0.00 +0.00 dB at its bits; BD-rate +0.0%; 2: +0.00 dB +0.0%")
    assert json.loads(first.read_text())["kodak clean"]["psnr"] == [28.0, 30.0, 32.0]
