"""`service.cli`: the commands on files, through pipes and at a server."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from model_store.images import psnr
from service.cli import main
from service.engine import Photo
from service.imaging import read_photo
from service.local import GivenUp, Local
from service.settings import DEFAULT_STORE, Settings, near_misses
from service.store import ModelStore
from tests.conftest import DATA, copied_store, image_bytes, noisy, other_store

Lines = pytest.CaptureFixture[str]
LIMPID = [sys.executable, "-m", "service"]


def test_compress_and_decompress_files(tmp_path: Path, parrots: Photo, capsys: Lines) -> None:
    degraded = noisy(parrots)
    (tmp_path / "in.png").write_bytes(image_bytes(degraded))
    assert main(["compress", str(tmp_path / "in.png"), "--rate", "5"]) == 0
    assert "bits per pixel at rate point 5" in capsys.readouterr().out
    assert main(["decompress", str(tmp_path / "in.lmp"), "-o", str(tmp_path / "out.webp")]) == 0
    data = (tmp_path / "out.webp").read_bytes()
    assert data[8:12] == b"WEBP"
    assert psnr(read_photo(data, 10**6), parrots) > psnr(degraded, parrots) + 3
    (tmp_path / "restored.v2").mkdir()
    assert main(["decompress", str(tmp_path / "in.lmp"), "-o", str(tmp_path / "restored.v2")]) == 0
    assert (tmp_path / "restored.v2" / "in.png").exists()
    (tmp_path / "other.lmp").write_bytes((tmp_path / "in.lmp").read_bytes())
    both = [str(tmp_path / "in.lmp"), str(tmp_path / "other.lmp")]
    assert main(["decompress", *both, "-o", str(tmp_path / "new.2026")]) == 0
    assert main(["decompress", both[0], "-o", f"{tmp_path}/new.2027/"]) == 0
    assert sorted(path.name for path in tmp_path.glob("new.*/*")) == ["in.png", "in.png", "other.png"]


def test_a_name_that_is_no_text_is_no_failure(tmp_path: Path, bikes: Photo) -> None:
    (tmp_path / os.fsdecode(b"bad\xff.png")).write_bytes(image_bytes(bikes[:32, :32]))
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for command in ("compress", "info"):
        done = subprocess.run([*LIMPID, command, str(tmp_path)], env=strict, capture_output=True, check=True)
        assert b"bad\xff.lmp" in done.stdout
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    (tmp_path / "a\xe9.lmp").write_bytes(b"none")
    done = subprocess.run([*LIMPID, "info", str(tmp_path)], env=ascii_only, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"a\\xe9.lmp: expected" in done.stderr
    assert b"bad\xff.lmp" in done.stdout


def test_a_budget_is_kept(tmp_path: Path, bikes: Photo, capsys: Lines) -> None:
    (tmp_path / "in.png").write_bytes(image_bytes(bikes))
    assert main(["compress", str(tmp_path / "in.png"), "--max-bytes", "4000"]) == 0
    assert (tmp_path / "in.lmp").stat().st_size <= 4000
    assert main(["compress", str(tmp_path / "in.png"), "--max-bytes", "40", "--force"]) == 1
    assert "at least" in capsys.readouterr().err


def test_a_folder_of_100_with_3_broken_ones(tmp_path: Path, bikes: Photo, capsys: Lines) -> None:
    """The 97 are finished, the three are named, and folders keep their shape."""
    broken = ("day/7.jpg", "night/50.jpg", "night/99.jpg")
    for index in range(100):
        path = tmp_path / "in" / ("day" if index < 50 else "night") / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop = bikes[index : index + 48, :64]
        path.write_bytes(image_bytes(crop, "JPEG"))
    (tmp_path / "in/notes.txt").write_text("not a photo, and nobody's business")
    (tmp_path / "in" / broken[0]).write_bytes(b"")
    (tmp_path / "in" / broken[1]).write_bytes(b"no photo")
    (tmp_path / "in" / broken[2]).write_bytes(image_bytes(bikes, "JPEG")[:2000])
    assert main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    named = [line for line in said.err.splitlines() if line.startswith("limpid: ")]
    assert [name for name in broken if any(name in line for line in named)] == list(broken)
    assert len(named) == 3
    assert "97 of 100 files done, 3 failed" in said.err
    done = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(done) == 97
    assert Path("night/51.lmp") in done
    assert (
        main(["decompress", str(tmp_path / "out/night/*.lmp"), "-o", str(tmp_path / "clean"), "--format", "jpeg"]) == 0
    )
    assert len(list((tmp_path / "clean").glob("*.jpeg"))) == 48


def test_nothing_is_overwritten_without_force(tmp_path: Path, bikes: Photo, capsys: Lines) -> None:
    (tmp_path / "in.png").write_bytes(image_bytes(bikes[:32, :32]))
    (tmp_path / "in.lmp").write_bytes(b"precious")
    assert main(["compress", str(tmp_path / "in.png")]) == 1
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "in.lmp").read_bytes() == b"precious"
    assert main(["compress", str(tmp_path / "in.png"), "--force"]) == 0
    assert (tmp_path / "in.lmp").read_bytes()[:4] == b"\x89LMP"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.lmp", "in.png"]


def test_progress_within_one_photo_ends_at_its_total(bikes: Photo) -> None:
    data, seen = image_bytes(bikes), []
    with closing(Local(Settings())) as codec:
        codec.watch(lambda done, total: seen.append((done, total)))
        stream = codec.compress(data).bitstream
        assert seen[-1][0] == seen[-1][1] == len(seen) > 10
        copy = codec.decompress(stream).image
        assert seen[-1][0] == seen[-1][1] == len(seen)
        foreseen, before = seen[0][1], len(seen)
        codec.compress(copy)  # a copy is looked at once more, which was not foreseen
        assert seen[-1][0] == seen[-1][1] == len(seen)
        assert len(seen) - before > 1.5 * foreseen
        codec.compress(data, max_bytes=4000)
        assert seen[-1][0] == seen[-1][1]


def test_effort_shows_in_the_picture_and_in_the_progress(parrots: Photo, tmp_path: Path, capsys: Lines) -> None:
    data, seen = image_bytes(parrots), []
    with closing(Local(Settings())) as codec:
        codec.watch(lambda done, total: seen.append((done, total)))
        plain = codec.compress(data).bitstream
        before = len(seen)
        refined = codec.compress(data, effort=3).bitstream
        assert seen[-1][0] == seen[-1][1] == len(seen) == 2 * before + 4
        better, worse = (read_photo(codec.decompress(one).image, 10**6) for one in (refined, plain))
    assert psnr(better, parrots) > psnr(worse, parrots) + 0.1
    assert len(refined) < 1.02 * len(plain)
    (tmp_path / "in.png").write_bytes(data)
    assert main(["compress", str(tmp_path / "in.png"), "--effort", "3"]) == 0
    assert f"{len(refined)} bytes" in capsys.readouterr().out


def test_work_can_be_given_up(bikes: Photo) -> None:
    with closing(Local(Settings())) as codec:
        codec.watch(lambda done, total: codec.give_up())
        with pytest.raises(GivenUp):
            codec.compress(image_bytes(bikes))


def test_pipes(parrots: Photo) -> None:
    def limpid(*args: str, given: bytes) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*LIMPID, *args], input=given, capture_output=True)

    stream = limpid("compress", "-", given=image_bytes(parrots)).stdout
    picture = limpid("decompress", "-", "-o", "-", given=stream).stdout
    assert psnr(read_photo(picture, 10**6), parrots) > 26
    facts = json.loads(limpid("info", "--json", "-", given=stream).stdout)
    assert (facts["width"], facts["height"], facts["rate_point"]) == (256, 256, 4)
    assert facts["bytes"] == len(stream)
    failed = limpid("compress", "-", given=b"no photo")
    assert (failed.returncode, failed.stdout) == (1, b"")
    assert failed.stderr.startswith(b"limpid: standard input: expected an image")


def test_info_and_compare_say_what_is_there(tmp_path: Path, parrots: Photo, capsys: Lines) -> None:
    (tmp_path / "in.png").write_bytes(image_bytes(parrots))
    assert main(["compress", str(tmp_path / "in.png")]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "in.lmp"), str(tmp_path / "in.png")]) == 1
    said = capsys.readouterr()
    assert "in.png: expected a Limpid bitstream" in said.err
    for words in ("rate point         4", "width              256", "checksum           good", "edge"):
        assert words in said.out
    assert main(["compare", str(tmp_path / "in.png"), str(tmp_path / "in.lmp")]) == 0
    said = capsys.readouterr()
    size = (tmp_path / "in.lmp").stat().st_size
    ratio = (tmp_path / "in.png").stat().st_size / size
    assert f"{size} ({ratio:.1f} times smaller)" in said.out
    assert f"-> {8 * size / parrots[..., 0].size:.3f}" in said.out
    assert main(["decompress", str(tmp_path / "in.lmp"), "-o", str(tmp_path / "out.png")]) == 0
    restored = read_photo((tmp_path / "out.png").read_bytes(), 10**6)
    assert f" {psnr(restored, parrots):.2f} dB" in said.out


def test_a_server_does_the_work(
    tmp_path: Path, parrots: Photo, capsys: Lines, guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.png").write_bytes(image_bytes(parrots))
    (tmp_path / "bad.png").write_bytes(b"no photo")
    at = ["--url", guarded, "--api-key", "sesame"]
    assert main(["compress", str(tmp_path / "*.png"), "-o", str(tmp_path), *at]) == 1
    assert "bad.png: expected an image" in capsys.readouterr().err
    assert main(["decompress", str(tmp_path / "in.lmp"), "-o", str(tmp_path / "out.png"), *at]) == 0
    assert main(["compress", str(tmp_path / "in.png"), "--force", "--url", guarded]) == 1
    assert "API key" in capsys.readouterr().err
    assert main(["compress", str(tmp_path / "in.png"), "--force", *at, "--deadline", "0.001"]) == 1
    assert re.fullmatch(r"limpid: .*in.png: .*within 0.001 seconds.*\n", capsys.readouterr().err)
    monkeypatch.setenv("LIMPID_PORT", "tcp://10.0.0.1:80")
    assert main(["compare", str(tmp_path / "in.png"), str(tmp_path / "in.lmp"), *at]) == 0
    assert psnr(read_photo((tmp_path / "out.png").read_bytes(), 10**6), parrots) > 26


def test_errors_are_one_line_and_status_1(tmp_path: Path, capsys: Lines) -> None:
    default = ModelStore(DEFAULT_STORE).index.default
    photo, stream, out = str(tmp_path / "in.png"), str(DATA / f"golden/{default}-bikes-4.lmp"), str(tmp_path / "a")
    (tmp_path / "in.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    for args, words in (
        (["compress", photo], "expected an image"),
        (["compress", str(tmp_path / "empty")], "empty"),
        (["compress", photo, "--deadline", "5"], "expected --deadline only with --url"),
        (["decompress", stream, "--api-key", "k"], "expected --api-key only with --url"),
        (["compress", "-", photo], "standard input"),
        (["decompress", photo, "-o", f"{out}.png"], "expected a Limpid bitstream"),
        (["decompress", str(tmp_path / "missing"), "-o", f"{out}.png"], "missing"),
        (["compress", ""], "empty"),
        (["compress", photo, "--url", ""], "expected a URL"),
        (["compress", photo, "-o", f"{out}.png"], "for a bitstream"),
        (["decompress", stream, "-o", f"{photo}/b.png"], f"{photo}: File exists"),
        (["decompress", stream, "-o", f"{out}.gif"], "expected an output name that ends in one of"),
        (["decompress", stream, "-o", f"{out}.png", "--format", "webp"], "goes with --format webp"),
        (["decompress", stream, "-o", f"{out}.png", "--quality", "80"], "only with a lossy format"),
    ):
        assert main(args) == 1
        said = capsys.readouterr().err
        assert said.startswith("limpid: ")
        assert words in said
        assert len(said.splitlines()) == 1
    assert not list(tmp_path.glob("a.*"))
    for wrong in ("--rate 9", "--max-bytes 0", "--target-bpp nan", "--target-bpp inf", "--target-bpp 65"):
        with pytest.raises(SystemExit) as stopped:
            main(["compress", "a.png", *wrong.split()])
        assert stopped.value.code == 2


def test_ctrl_c_ends_the_wait_for_a_server_and_for_a_pipe(tmp_path: Path, bikes: Photo) -> None:
    (tmp_path / "in.png").write_bytes(image_bytes(bikes))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and answers nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
        waiting = partial(subprocess.Popen, preexec_fn=heard, stdin=subprocess.PIPE)
        at_server = waiting([*LIMPID, "compress", str(tmp_path / "in.png"), "--url", url])
        silent.accept()[0].recv(1)
        at_pipe = waiting([*LIMPID, "compress", "-", "--url", url])
        time.sleep(2)
        for waits in (at_server, at_pipe):
            assert waits.poll() is None
            waits.send_signal(signal.SIGINT)
            assert waits.wait(10) == 130


def test_closed_standard_streams_are_no_trouble(tmp_path: Path, bikes: Photo) -> None:
    (tmp_path / "in.png").write_bytes(image_bytes(bikes))
    limpid = f"{shlex.join(LIMPID)} compress"
    (tmp_path / "more.png").write_bytes(image_bytes(bikes))
    closed = subprocess.run(
        f"{limpid} in.png more.png >&- 2>&- && {limpid} - <&-; {limpid} in.png -o - >&-; {limpid} - <in.png >&-",
        shell=True, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert len(list(tmp_path.glob("*.lmp"))) == 2
    assert (closed.returncode, closed.stderr) == (
        1,
        "".join(
            f"limpid: {name} is closed\n"
            for name in ("standard input: standard input", "in.png: standard output", "standard input: standard output")
        ),
    )


def test_a_servers_client_needs_no_setting_of_the_service(monkeypatch: pytest.MonkeyPatch, capsys: Lines) -> None:
    """Kubernetes gives pods beside a Service of the name limpid such a variable."""
    monkeypatch.setenv("LIMPID_PORT", "tcp://10.0.0.1:80")
    assert main(["compress", "missing.png", "--url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err == "limpid: missing.png: No such file or directory\n"
    assert main(["compare", "missing.png", "missing.lmp", "--url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err == "limpid: missing.png: No such file or directory\n"


def test_names_that_a_terminal_cannot_show_are_no_failures(tmp_path: Path) -> None:
    default = ModelStore(DEFAULT_STORE).index.default
    names = ("日本.lmp", "z\udcff.lmp")
    for name in names:
        (tmp_path / name).write_bytes((DATA / f"golden/{default}-bikes-4.lmp").read_bytes())
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [*LIMPID, "info", *names], cwd=tmp_path, env={**env, "PYTHONPATH": os.getcwd()}, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(rb"\u65e5\u672c.lmp")
    assert b"z\xff.lmp" in done.stdout


def test_store_commands_verify_add_and_choose(tmp_path: Path, capsys: Lines) -> None:
    copied_store(tmp_path / "store")
    other_store(tmp_path / "other", "edge-next")
    here = ["--store", str(tmp_path / "store")]
    assert main(["store", "add", str(tmp_path / "other"), "edge-next", *here]) == 0
    assert main(["store", "default", "edge-next", *here]) == 0
    assert main(["store", "verify", *here]) == 0
    assert capsys.readouterr().out.count(": good") == 2
    assert main(["store", "add", str(tmp_path / "store"), "edge-next", "--store", str(tmp_path / "small")]) == 0
    assert "the default of" in capsys.readouterr().out
    assert main(["store", "verify", "--store", str(tmp_path / "small")]) == 0
    assert capsys.readouterr().out.count(": good") == 1
    (tmp_path / "store" / "edge-next.safetensors").write_bytes(b"")
    default = ModelStore(tmp_path / "store").index.models[0].name
    assert main(["store", "verify", *here]) == 1
    said = capsys.readouterr()
    assert "edge-next" in said.err
    assert f"{default}: " in said.out
    (tmp_path / "store" / f"{default}.safetensors").write_bytes(b"")  # the others are looked at all the same
    assert main(["store", "verify", *here]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_variants_lists_the_store(monkeypatch: pytest.MonkeyPatch, capsys: Lines) -> None:
    monkeypatch.setenv("LIMPID_STORE", str(DEFAULT_STORE))
    index = ModelStore(DEFAULT_STORE).index
    assert main(["variants"]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [head.split(":")[0].split()[0] for head in heads] == [entry.name for entry in index.models]
    assert [head.split(":")[0] for head in heads if "(default)" in head] == [f"{index.default} (default)"]


def test_only_the_models_that_are_used_are_loaded(bikes: Photo) -> None:
    with closing(Local(Settings(store=DEFAULT_STORE))) as codec:
        first = codec.compress(image_bytes(bikes[:64, :64]), model="edge-2")
        assert codec.decompress(first.bitstream).model == "edge-2"
        models = codec._engine.models
        assert [name for name, model in models.items() if "codec" in vars(model)] == ["edge-2"]
        assert first.degradations
        silent = codec.compress(image_bytes(bikes[:64, :64]), model="edge-1")
        assert silent.degradations == {}


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Lines) -> None:
    monkeypatch.setenv("LIMPID_MAX_PIXELS", "many")
    assert main(["variants"]) == 1
    assert capsys.readouterr().err.startswith("limpid: LIMPID_MAX_PIXELS: ")


def test_keys_that_are_none_do_not_leave_the_service_open(monkeypatch: pytest.MonkeyPatch, capsys: Lines) -> None:
    monkeypatch.setenv("LIMPID_API_KEYS", " , ")
    assert main(["serve"]) == 1
    assert capsys.readouterr().err.startswith("limpid: LIMPID_API_KEYS: ")
    monkeypatch.setenv("LIMPID_API_KEYS", "")  # as Compose passes it
    assert Settings().api_keys == []


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Lines, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    monkeypatch.setenv("LIMPID_DEVICE", "gpu")
    assert main(["compress", str(tmp_path / "a.png")]) == 1
    assert "gpu" in capsys.readouterr().err


def test_a_misspelt_setting_is_not_overlooked(monkeypatch: pytest.MonkeyPatch, capsys: Lines) -> None:
    monkeypatch.setenv("LIMPID_API_KEY", "secret")  # the client's; the service would be open
    assert main(["serve"]) == 1
    said = capsys.readouterr().err
    assert "LIMPID_API_KEY is no setting" in said
    assert "LIMPID_API_KEYS" in said
    assert near_misses({"LIMPID_API_KEY": "a", "LIMPID_API_KEYS": "a,b"}) == []
    assert near_misses({"LIMPID_API_KEY": "a", "LIMPID_API_KEYS": ""})  # as Compose passes one that is not set
    assert near_misses({"LIMPID_PORT_8000_TCP": "tcp://10.0.0.1:8000", "LIMPID_CPUS": "2"}) == []
    assert near_misses({"LIMPID_MAX_PIXEL": "1"}) == [("LIMPID_MAX_PIXEL", "LIMPID_MAX_PIXELS")]


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    stream = sorted((DATA / "golden").glob("edge-8-*.lmp"))[0]
    listing = subprocess.Popen([*LIMPID, "info", str(stream)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert listing.stdout
    assert listing.stderr
    listing.stdout.close()
    assert listing.wait(60) == 1
    assert listing.stderr.read() == b""
