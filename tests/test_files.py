"""`service.files`: which files are meant, where results go, and that a file is written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from service.files import Pair, overlooked, pair_up, write_whole


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.jpg", "b.PNG", "deep/c.jpg", "deep/notes.txt", "s.lmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pairs(*inputs: str, output: str | None = None) -> list[tuple[str, str]]:
    found = pair_up(inputs, output, takes=(".jpg", ".png"), gives=".lmp")
    return [(str(pair.source), str(pair.target)) for pair in found]


@pytest.mark.usefixtures("here")
def test_results_lie_beside_their_inputs_or_in_the_folder_that_is_named() -> None:
    assert pairs("a.jpg") == [("a.jpg", "a.lmp")]
    assert pairs("a.jpg", output="x.lmp") == [("a.jpg", "x.lmp")]
    assert pairs("a.jpg", output="new") == [("a.jpg", "new/a.lmp")]
    assert pairs("a.jpg", output="deep") == [("a.jpg", "deep/a.lmp")]
    assert pairs(".", output="out") == [
        ("a.jpg", "out/a.lmp"),
        ("b.PNG", "out/b.lmp"),
        ("deep/c.jpg", "out/deep/c.lmp"),
    ]
    assert pairs("**/*.jpg", "a.jpg") == [("a.jpg", "a.lmp"), ("deep/c.jpg", "deep/c.lmp")]
    assert pairs("missing.jpg") == [("missing.jpg", "missing.lmp")]  # reading it says that it is missing


def test_files_of_one_stem_keep_their_endings(here: Path) -> None:
    (here / "a.png").touch()
    assert pairs("a.jpg", "a.png", "b.PNG") == [
        ("a.jpg", "a.jpg.lmp"),
        ("a.png", "a.png.lmp"),
        ("b.PNG", "b.lmp"),
    ]


def test_images_of_other_formats_are_told_not_other_files(here: Path) -> None:
    (here / "deep" / "d.gif").touch()
    (here / "linked").symlink_to(here / "deep")
    (here / "nothing").mkdir()
    assert overlooked(["nothing"], (".jpg",)) == []  # which is an error anyway
    seen = overlooked([".", "a.jpg", "nothing", "nothing"], (".jpg", ".png"), images=True)
    assert [(str(path), why) for path, why in seen] == [
        ("deep/d.gif", "of a folder only .jpg, .png are taken"),
        ("linked", "is a linked folder"),
        ("nothing", "it holds no .jpg, .png"),
    ]
    assert [str(path) for path, _ in overlooked(["."], (".lmp",))] == ["linked"]


@pytest.mark.usefixtures("here")
def test_a_pattern_that_nothing_fits_is_a_file_that_is_not_there() -> None:
    """Reading it says so, and the others are read."""
    assert [source for source, _ in pairs("a.jpg", "typo*.jpg")] == ["a.jpg", "typo*.jpg"]
    with pytest.raises(ValueError, match=r"found no file that fits typo\*"):
        pairs("a.jpg", "typo*.jpg", output="x.lmp")  # which is a file's name, not a folder's


def test_what_cannot_be_looked_at_stands_for_itself(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it names the error, and the others are read."""
    look, closed = os.scandir, "./deep"

    def scandir(path: str) -> object:
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [source for source, _ in pairs(".", output="out")] == ["a.jpg", "b.PNG", "deep"]
    closed = "."
    assert [target for _, target in pairs(".", "a.jpg", output=".")] == [f"{here.name}.lmp", "a.lmp"]
    assert pairs("a.jpg", f"{'n' * 300}.jpg")[1][0] == f"{'n' * 300}.jpg"


@pytest.mark.usefixtures("here")
def test_pipes_go_alone() -> None:
    assert pair_up(["-"], None, takes=(), gives=".lmp") == [Pair(None, None)]
    assert pairs("-", output="x.lmp") == [("None", "x.lmp")]
    assert pairs("a.jpg", output="-") == [("a.jpg", "None")]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("inputs", "output", "words"),
    [
        (["-", "a.jpg"], None, "alone"),
        (["a.jpg", "b.PNG"], "-", "one input"),
        (["-"], "deep", "folder"),
        (["-"], "new/", "folder"),
        (["nothing*.jpg"], None, "found no"),
        ([""], None, "empty"),
        (["a.jpg"], "", "empty"),
        (["a.jpg", "deep/../a.jpg", "./deep/c.jpg"], "out", "both"),
    ],
)
def test_what_makes_no_sense_is_named(inputs: list[str], output: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pair_up(inputs, output, takes=(".jpg", ".png"), gives=".lmp")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.lmp"
    write_whole(path, b"first", overwrite=False)
    with pytest.raises(FileExistsError, match="--force"):
        write_whole(path, b"second", overwrite=False)
    assert path.read_bytes() == b"first"
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"third")
    assert path.read_bytes() == b"first"
    assert [one.name for one in tmp_path.iterdir()] == ["a.lmp"]


def test_a_file_that_is_overwritten_stays_as_private_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.lmp"
    path.touch(0o600)
    write_whole(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr("os.chmod", lambda *_, **__: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    write_whole(path, b"where modes cannot be changed")
    assert path.read_bytes() == b"where modes cannot be changed"


def test_any_name_that_the_file_system_takes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".lmp")
    write_whole(path, b"long", overwrite=False)
    assert path.read_bytes() == b"long"


def test_a_link_is_followed_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.lmp").write_bytes(b"old")
    (tmp_path / "link.lmp").symlink_to(tmp_path / "real" / "a.lmp")
    write_whole(tmp_path / "link.lmp", b"new")
    assert (tmp_path / "link.lmp").is_symlink()
    assert (tmp_path / "real" / "a.lmp").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_whole(tmp_path / "pipe", b"through")
    reader.join(10)
    assert read == [b"through"]
    (tmp_path / "to-pipe").symlink_to(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_whole(tmp_path / "to-pipe", b"again")
    reader.join(10)
    assert read == [b"through", b"again"]
    script = "from pathlib import Path; from service.files import write_whole; write_whole(Path('/dev/stdout'), b'x')"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"x"
    assert (tmp_path / "pipe").is_fifo()
