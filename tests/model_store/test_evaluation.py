"""`model_store.evaluation`: the arithmetic and the peers behind the published figures."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from model_store.evaluation import __main__ as command
from model_store.evaluation import measuring, trials
from model_store.evaluation.codecs import PEERS, LimpidCodec, denoised, peer_points
from model_store.evaluation.conditions import MEASURED, SETS, degraded_photo, uploaded
from model_store.evaluation.measuring import peers_of, refined_of
from model_store.evaluation.rate_distortion import (
    Curve,
    Record,
    bd_rate,
    check_same_photos,
    curves,
    frontier,
    read_records,
)
from model_store.evaluation.tables import effort_table, plot, published_table, table
from model_store.images import psnr
from model_store.index import STORE, read_index
from service.codec.bitstream import Degradation, DegradationKind
from service.engine import Photo


def records(codec: str, points: list[tuple[int, float, float]], condition: str = "noise-25") -> list[Record]:
    """Two photos, 0.1 bits per pixel and 2 dB apart, whose means are the points."""
    return [
        Record("kodak", photo, condition, codec, setting, 100, bpp + side * 0.05, psnr + side)
        for setting, bpp, psnr in points
        for photo, side in (("a", -1), ("b", 1))
    ]


RISING = Curve((0.1, 0.3, 0.9), (24.0, 27.0, 31.0), (1, 2, 3))
FALLING = Curve((0.1, 0.3, 0.9), (24.0, 23.0, 21.0), (1, 2, 3))


def test_a_budget_is_not_spent_on_noise() -> None:
    assert FALLING.psnr_within(0.5) == 24.0
    assert 27.0 < float(RISING.psnr_within(0.5) or 0) < 31.0
    assert RISING.psnr_within(2.0) == 31.0
    assert RISING.psnr_within(0.05) is None


def test_of_two_points_at_one_rate_the_better_counts() -> None:
    twice = Curve((0.1, 0.1, 0.3), (24.0, 25.0, 27.0), (1, 2, 3))
    assert twice.psnr_at(0.1) == pytest.approx(25)
    assert 25 < float(twice.psnr_within(0.2) or 0) < 27


def test_half_the_bits_at_equal_quality_is_minus_50_percent() -> None:
    half = Curve(tuple(bpp / 2 for bpp in RISING.bpp), RISING.psnr, RISING.setting)
    assert bd_rate(half, RISING) == pytest.approx(-50)
    assert bd_rate(RISING, half) == pytest.approx(100)


def test_what_costs_more_and_is_no_better_does_not_count() -> None:
    peak = Curve((*RISING.bpp, 1.5), (*RISING.psnr, 30.0), (1, 2, 3, 4))
    assert frontier(peak) == RISING
    assert bd_rate(peak, RISING) == pytest.approx(0)
    assert bd_rate(FALLING, RISING) is None


def test_too_small_a_range_of_quality_tells_nothing() -> None:
    above = Curve(RISING.bpp, tuple(value + 6.5 for value in RISING.psnr), RISING.setting)
    assert bd_rate(above, RISING) is None


def test_the_table_holds_means_over_photos() -> None:
    measured = [
        *records("INPUT", [(0, 0.0, 20.0)]),
        *records("LIMPID", [(1, 0.1, 27.0), (2, 0.5, 29.0), (3, 0.9, 30.0)]),
        *records("JPEG", [(10, 0.2, 25.0), (50, 0.8, 28.0)]),
    ]
    measured = [Record(**{**vars(r), "bytes": 0}) if r.codec == "INPUT" else r for r in measured]
    assert curves(measured)["kodak", "noise-25", "LIMPID"].psnr == pytest.approx((27, 29, 30))
    head, _, row = table(measured).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | ")))
    assert cells["input dB"] == "20.00"
    assert cells["LIMPID dB within 0.5"] == "29.00"
    assert 25 < float(cells["JPEG dB within 0.5"]) < 28
    assert cells["BD-rate vs JPEG"].startswith("-")


def test_the_published_curve_is_met_at_its_own_rates() -> None:
    ours = records("LIMPID", [(1, 0.05, 26.04), (2, 0.099, 27.04), (3, 0.9, 33.0)], "sensor-1")
    row = next(line for line in published_table(ours).splitlines() if line.startswith("| sensor-1 | 0.099 |"))
    assert row == "| sensor-1 | 0.099 | 28.04 | 27.04 | -1.00 |"


def test_every_line_of_a_figure_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    named: list[str] = []
    monkeypatch.setattr(Figure, "legend", lambda self, lines, labels, **how: named.extend(labels))
    measured = [
        *records("LIMPID", [(1, 0.1, 27.0), (2, 0.5, 29.0)], "clean"),
        *records("LIMPID", [(1, 0.1, 27.0), (2, 0.5, 29.0)]),
        *records("NLM+AVIF", [(20, 0.1, 25.0), (40, 0.5, 26.0)]),
        Record("kodak", "a", "noise-25", "INPUT", 0, 0, 0.0, 20.0),
    ]
    (path,) = plot(measured, "edge-0", tmp_path)
    assert path == tmp_path / "edge-0-kodak.png"
    assert sorted(named) == ["NLM+AVIF", "edge-0", "upload"]


@pytest.mark.parametrize("colour", [(200, 40, 60), (30, 90, 220), (90, 180, 40)])
def test_a_denoised_photo_keeps_its_colour(colour: tuple[int, int, int]) -> None:
    flat = np.full((48, 64, 3), colour, np.uint8)
    assert np.abs(denoised(flat, 10).mean((0, 1)) - colour).max() < 3


def test_the_denoiser_sees_colours_as_they_are(parrots: Photo, tmp_path: Path) -> None:
    """It weighs lightness and colour apart, so what OpenCV reads from a file itself has to come out the same."""
    import cv2

    noisy = degraded_photo(parrots[:128, :128], 0, "noise-25")
    Image.fromarray(noisy).save(tmp_path / "a.png")
    read = cv2.imread(str(tmp_path / "a.png"))
    assert read is not None
    wanted = cv2.fastNlMeansDenoisingColored(read, None, 14, 14, 7, 21)
    assert (cv2.cvtColor(wanted, cv2.COLOR_BGR2RGB) == denoised(noisy, 14)).all()
    assert psnr(denoised(noisy, 14), parrots[:128, :128]) > 28


@pytest.mark.parametrize("format", PEERS)
def test_a_peer_is_a_real_file_of_the_photo(parrots: Photo, format: str) -> None:
    points = list(peer_points(format, parrots))
    assert [quality for quality, _, _ in points] == list(PEERS[format])
    sizes = [size for _, size, _ in points]
    assert sizes == sorted(sizes)
    assert all(decoded.shape == parrots.shape for _, _, decoded in points)
    values = [psnr(decoded, parrots) for _, _, decoded in points]
    assert values == sorted(values)
    assert values[-1] > 33


@pytest.mark.parametrize(
    ("condition", "value"),
    [
        ("noise-25", 20.44),
        ("sensor-2", 25.81),
        ("rain", 19.46),
        ("snow", 20.98),
        ("haze", 10.65),
        ("low-light", 10.93),
    ],
)
def test_what_is_measured_on_stays_what_it_was(parrots: Photo, condition: str, value: float) -> None:
    """Results of another day are compared with these: a changed draw would make them lies."""
    assert psnr(degraded_photo(parrots, 3, condition), parrots) == pytest.approx(value, abs=0.02)


def test_a_pair_is_the_photo_and_the_one_beside_it(tmp_path: Path, parrots: Photo) -> None:
    clean, noisy = tmp_path / "a_clean.png", tmp_path / "a_noisy.png"
    Image.fromarray(parrots).save(clean)
    with pytest.raises(ValueError, match="expected one of a_"):
        uploaded(clean, parrots, 0, "pairs")
    Image.fromarray(255 - parrots).save(noisy)
    Image.fromarray(parrots).save(tmp_path / "a_b_noisy.png")  # of another pair
    assert np.array_equal(uploaded(clean, parrots, 0, "pairs"), 255 - parrots)


@pytest.fixture
def pairs(tmp_path: Path, parrots: Photo) -> Path:
    """Two small pairs of the set `rain`, the degraded photos negatives."""
    (tmp_path / "rain").mkdir()
    for name in "ab":
        for kind, photo in (("clean", parrots), ("rain", 255 - parrots)):
            Image.fromarray(photo[:48, :64]).save(tmp_path / "rain" / f"{name}_{kind}.png")
    return tmp_path


@pytest.fixture
def of_negatives(parrots: Photo) -> float:
    """PSNR of a codec that gets the negative, keeps it and is measured against the photo."""
    return psnr(np.invert(parrots[:48, :64]), parrots[:48, :64])


def test_every_peer_is_measured_at_every_quality(pairs: Path, of_negatives: float) -> None:
    measured = peers_of(pairs / "rain/a_clean.png", 0, "rain")
    assert {(record.codec, record.setting) for record in measured} == {
        ("INPUT", 0), *((format, quality) for format, qualities in PEERS.items() for quality in qualities)
    }  # fmt: skip
    assert all(record.bpp == pytest.approx(8 * record.bytes / (48 * 64), abs=1e-5) for record in measured)
    assert all(record.psnr == pytest.approx(of_negatives, abs=1) for record in measured)


def test_the_denoiser_is_tuned_for_what_comes_after_it(
    pairs: Path, parrots: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pairs / "kodak").mkdir()
    path = pairs / "kodak" / "a.png"
    Image.fromarray(parrots[:128, :128]).save(path)
    monkeypatch.setitem(SETS, "kodak", tuple(one for one in SETS["kodak"] if one.name in ("clean", "noise-25", "rain")))
    monkeypatch.setattr(measuring, "SHARES", (0.4, 3.0))
    tried = measuring.tried_of(path, 0, "kodak")
    shares = measuring.best_shares(tried)
    assert shares == {"noise-25": {"WEBP": 0.4, "AVIF": 0.4}}
    best = {(r.codec.split()[0], r.setting): r for r in tried if r.codec.endswith("0.4")}
    for record in measuring.cascade_of({"noise-25": {"WEBP": 0.4, "AVIF": 3.0}}, path, 0, "kodak"):
        same = best[record.codec.removeprefix("NLM+"), record.setting]
        assert (record.bytes == same.bytes) is record.codec.endswith("WEBP")
    within = {"AVIF 0.3": 26.0, "AVIF 0.5": 25.0, "WEBP 0.3": 24.0, "WEBP 0.5": 25.0}
    told = [one for codec, best in within.items() for one in records(codec, [(1, 0.4, best), (2, 0.6, best + 3)])]
    assert measuring.best_shares(told) == {"noise-25": {"AVIF": 0.3, "WEBP": 0.5}}


def test_means_of_other_photos_are_not_compared() -> None:
    ours, theirs = records("LIMPID", [(1, 0.1, 27.0)]), records("JPEG", [(10, 0.2, 25.0)])
    check_same_photos([*ours, *theirs, *records("JPEG", [(10, 0.2, 25.0)], "clean")])
    with pytest.raises(ValueError, match=r"same photos of kodak under noise-25 .*'LIMPID at 1': 1, 'JPEG at 10': 2"):
        check_same_photos([*ours[:1], *theirs])
    with pytest.raises(ValueError, match=r"'LIMPID at 1': 2, 'LIMPID at 2': 1"):  # a mean of one setting, too
        check_same_photos([*ours, *records("LIMPID", [(2, 0.2, 28.0)])[:1]])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["report"], "expected results of edge-9 in"),
        (["report", "--name", "edge-99"], "expected a model of"),
        (["naming", "--photos", "."], "expected PNG photos in kodak"),
        (["effort", "--photos", ".", "--conditions", "noise15"], "invalid choice: 'noise15'"),
    ],
)
def test_what_cannot_be_measured_is_told_and_spoils_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (STORE / "store.json").read_bytes()
    monkeypatch.setattr("sys.argv", ["evaluation", *args, "--results", str(tmp_path / "results")])
    with pytest.raises(SystemExit):
        command.main()
    assert words in capsys.readouterr().err
    assert (STORE / "store.json").read_bytes() == before
    assert not list(tmp_path.glob("results/*"))


def test_what_is_measured_of_a_few_photos_takes_no_place_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluation", "peers", "--photos", ".", "--limit", "1"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--results of its own" in capsys.readouterr().err


def test_what_a_store_says_of_its_models_is_what_was_measured() -> None:
    for entry in read_index(STORE)["models"]:
        paths = [command.RESULTS / f"{entry['name']}-{photos}.json" for photos in MEASURED]
        wanted = {
            (photos, condition, rate): (round(bpp, 4), round(value, 3))
            for (photos, condition, _), curve in curves(read_records(path for path in paths if path.exists())).items()
            for rate, bpp, value in zip(curve.setting, curve.bpp, curve.psnr)
        }
        told = {(m["photos"], m["degradation"], m["rate"]): (m["bpp"], m["psnr"]) for m in entry["measured"]}
        assert told == wanted, entry["name"]
        assert told


def test_every_photo_is_measured_by_processes_of_their_own(pairs: Path, of_negatives: float) -> None:
    options = ["--photos", str(pairs), "--results", str(pairs), "--sets", "rain", "--jobs", "2", "--name", "edge-8"]
    subprocess.run([sys.executable, "-m", "model_store.evaluation", "model", *options], check=True)
    measured = read_records([pairs / "edge-8-rain.json"])
    assert {record.codec for record in measured} == {"LIMPID"}
    rates = [rate for (condition,) in (SETS["rain"],) for rate in condition.rates]
    assert [(record.photo, record.setting) for record in measured] == [(name, rate) for name in "ab" for rate in rates]
    assert all(record.bpp == pytest.approx(8 * record.bytes / (48 * 64), abs=1e-5) for record in measured)
    assert all(record.psnr == pytest.approx(of_negatives, abs=3) for record in measured)


def test_naming_counts_the_first_name_of_a_kind(tmp_path: Path, parrots: Photo) -> None:
    (tmp_path / "kodak").mkdir()
    Image.fromarray(parrots[:64, :64]).save(tmp_path / "kodak" / "a.png")
    said = (Degradation(DegradationKind.NOISE, 0.5), Degradation(DegradationKind.RAIN, 0.2))
    fake = SimpleNamespace(
        device=torch.device("cpu"), codec=SimpleNamespace(analyse=lambda x, rate: (None, None, [said]))
    )
    summary = cast(dict[str, Any], trials.naming(cast(LimpidCodec, fake), tmp_path)["summary"])
    assert summary["noise"] == summary["sensor-noise"] == 1
    assert summary["rain"] == summary["clean"] == 0
    assert summary["right"] == pytest.approx(2 / 9, abs=1e-4)
    assert summary["right_and_nothing_else"] == 0


def test_generations_lose_from_the_first_on(tmp_path: Path, parrots: Photo) -> None:
    (tmp_path / "kodak").mkdir()
    Image.fromarray(parrots[:32, :32] // 2).save(tmp_path / "kodak" / "a.png")
    fake = SimpleNamespace(round_trip=lambda photo, rates: [(None, photo + np.uint8(1))])
    found = trials.generations(cast(LimpidCodec, fake), tmp_path)
    summary = cast(dict[str, Any], found["summary"])
    assert summary["largest_loss_db"] == pytest.approx(20 * math.log10(trials.GENERATIONS), abs=0.002)


def test_refinement_is_measured_beside_none(tmp_path: Path, parrots: Photo) -> None:
    (tmp_path / "kodak").mkdir()
    Image.fromarray(parrots).save(tmp_path / "kodak" / "a.png")
    for condition in ("clean", "noise-15"):
        found = refined_of(STORE, "edge-8", (0, 2), condition, (2, 4, 6), tmp_path / "kodak/a.png", 0, "kodak")
        assert [(record.condition, record.codec, record.setting) for record in found] == [
            (condition, f"effort-{effort}", rate) for effort in (0, 2) for rate in (2, 4, 6)
        ]
        none, refined = ([cell.strip() for cell in row.split("|")] for row in effort_table(found).splitlines()[2:])
        assert (none[1:4], none[5]) == ([condition, "2 to 6", "0"], "+0.0%")
        assert refined[1:4] == [condition, "2 to 6", "2"]
        assert float(refined[5].rstrip("%")) < -1
