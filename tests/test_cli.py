"""`service.cli`: the commands on files, and the real server as a stranger starts it."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from service.cli import main
from service.engine import Photo
from service.imaging import read_photo
from tests.conftest import copied_store, image_bytes, noisy, other_store, psnr
from tests.served import served


def test_compress_and_decompress_files(tmp_path: Path, parrots: Photo, capsys: pytest.CaptureFixture[str]) -> None:
    degraded = noisy(parrots)
    (tmp_path / "in.png").write_bytes(image_bytes(degraded))
    assert main(["compress", str(tmp_path / "in.png"), str(tmp_path / "a.lmp"), "--rate", "5"]) == 0
    assert "bits per pixel" in capsys.readouterr().out
    assert main(["decompress", str(tmp_path / "a.lmp"), str(tmp_path / "out.png")]) == 0
    back = read_photo((tmp_path / "out.png").read_bytes(), 10**6)
    assert psnr(back, parrots) > psnr(degraded, parrots) + 3


def test_errors_are_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.png").write_bytes(b"no image")
    assert main(["compress", str(tmp_path / "in.png"), str(tmp_path / "a.lmp")]) == 1
    assert main(["decompress", str(tmp_path / "in.png"), str(tmp_path / "a.png")]) == 1
    assert main(["decompress", str(tmp_path / "missing"), str(tmp_path / "a.png")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("limpid: ") for line in lines)


def test_store_commands_verify_add_and_choose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied_store(tmp_path / "store")
    other_store(tmp_path / "other", "edge-next")
    here = ["--store", str(tmp_path / "store")]
    assert main(["store", "add", str(tmp_path / "other"), "edge-next", *here]) == 0
    assert main(["store", "default", "edge-next", *here]) == 0
    assert main(["store", "verify", *here]) == 0
    assert capsys.readouterr().out.count(": good") == 2
    (tmp_path / "store" / "edge-next.safetensors").write_bytes(b"")
    assert main(["store", "verify", *here]) == 1
    assert "edge-next" in capsys.readouterr().err


def test_variants_lists_the_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants"]) == 0
    assert "(default)" in capsys.readouterr().out


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LIMPID_MAX_PIXELS", "many")
    assert main(["variants"]) == 1
    assert "max_pixels" in capsys.readouterr().err


def test_the_server_starts_answers_and_stops(parrots: Photo) -> None:
    with served() as (base, process):
        with urllib.request.urlopen(f"{base}/compress?rate=2", data=image_bytes(parrots)) as answer:
            stream = answer.read()
        with urllib.request.urlopen(f"{base}/decompress", data=stream) as answer:
            assert psnr(read_photo(answer.read(), 10**6), parrots) > 24
    assert process.returncode == 0
