"""Every command and every Python example of README and docs, run as written against a real server."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model_store.evaluation.rate_distortion import Record, bd_rate, curves, input_psnr, read_records
from model_store.evaluation.tables import effort_table
from service.errors import KINDS
from service.settings import DEFAULT_STORE, Settings
from service.state import Service
from service.store import ModelStore
from tests.conftest import copied_store, image_bytes, noisy, other_store, photo
from tests.served import served

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
ELSEWHERE = ("make ", "docker ", "kubectl ")
"""Of these, `make run` and `make test` are what brought us here, and the others need a machine with containers."""

SHORTER = (
    ("--minutes 120", "--minutes 0.03 --no-compile --crop 64"),
    ("--minutes 60 --crop 224", "--minutes 0.03 --no-compile --crop 64"),
    ("--minutes 40", "--minutes 0.03 --no-compile --crop 64"),
    ("--minutes 30", "--minutes 0.03 --crop 64"),
    ("--minutes 10", "--minutes 0.03"),
    ("--keep-default --photos photos", "--keep-default --photos photos --batches 2"),
    ("timeout 20 python", "python"),
    ("--max-bytes 40000 || true", "--max-bytes 40000 & until [ -e streams/0001.jpg.lmp ]; do sleep 0.1; done; kill $!"),
)
"""Training goes on for two seconds, on smaller crops, and is not compiled; the gateway ends when its work is done."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader may have it: a noisy photo, two stores, some photographs, and the checkout's deploy/."""
    folder = tmp_path_factory.mktemp("desk")
    clean = photo("parrots")
    (folder / "noisy.jpg").write_bytes(image_bytes(noisy(clean), "JPEG"))
    copied_store(folder / "my-store")
    other_store(folder / "other-store", "edge-next")
    (folder / "results-copy").mkdir()
    for path in (ROOT / "model_store/evaluation/results").glob("*.json"):
        (folder / "results-copy" / path.name).write_bytes(path.read_bytes())
    for index in range(3):
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(np.rot90(clean, index)).save(folder / f"photos/{index}.png")
    (folder / "photos-eval/kodak").mkdir(parents=True)
    for name in ("parrots", "bikes"):
        Image.fromarray(photo(name)[:128, :128]).save(folder / f"photos-eval/kodak/{name}.png")
    for pair in ("rain/1_clean", "rain/1_rain", "cc15/1_clean", "cc15/1_noisy"):
        (folder / "photos-eval" / pair).parent.mkdir(exist_ok=True)
        Image.fromarray(clean[:128, :128]).save(folder / f"photos-eval/{pair}.png")
    (folder / "deploy").symlink_to(ROOT / "deploy")
    return folder


@pytest.fixture(scope="module")
def server(desk: Path) -> Iterator[tuple[str, int]]:
    with served(store=desk / "my-store") as (base, process):
        yield base, process.pid


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and code of every block of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


def run(command: list[str], desk: Path, server: tuple[str, int]) -> str:
    tools = [Path(sys.executable).parent, ROOT / ".venv/debian/usr/bin"]
    env = {**os.environ, "LIMPID_PID": str(server[1]), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    env["PATH"] = os.pathsep.join([*map(str, tools), os.environ["PATH"]])
    done = subprocess.run(command, cwd=desk, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_example_runs_as_written(page: str, desk: Path, server: tuple[str, int]) -> None:
    for language, code in blocks(page):
        code = code.replace("http://localhost:8000", server[0]).replace("localhost:8000", server[0])
        if language == "python":
            run([sys.executable, "-c", code], desk, server)
        if language != "sh":
            continue
        lines = [line for line in code.splitlines() if not line.startswith(ELSEWHERE)]
        script = "\n".join(lines)
        for long, short in SHORTER:
            script = script.replace(long, short)
        said = run(["bash", "-euo", "pipefail", "-c", script.replace("curl ", "curl -sS ")], desk, server)
        assert "urn:limpid:problem" not in said or "-d 'hello'" in script


def test_every_tool_beside_the_product_still_imports() -> None:
    """Benchmarks, the golden streams' and the picture's makers run by hand: they must not rot meanwhile."""
    tools = [
        "docs.picture",
        "tests.golden",
        *(f"tests.bench.{path.stem}" for path in (ROOT / "tests/bench").glob("*.py")),
    ]
    for name in tools:
        importlib.import_module(name)


def slug(heading: str) -> str:
    """As the forges make an anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, "deploy/README.md", "model_store/README.md"]:
        text = (ROOT / page).read_text()
        for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^):]+)\)", text)):
            found = (ROOT / page).parent / target if target else ROOT / page
            assert found.exists(), f"{page}: {target}"
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.M) if anchor else []
            assert not anchor or anchor in {slug(heading) for heading in headings}, f"{page}: {target}#{anchor}"
        for name in re.findall(r"`((?:service|model_store|deploy|tests|docs)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_every_kind_of_problem_is_documented() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| ((?:`[\w-]+`(?:, )?)+)", (ROOT / "docs/http-api.md").read_text(), re.M)
    told: set[tuple[int, str]] = set()
    for statuses, slugs in rows:
        of_row, names = [int(status) for status in statuses.split(",")], re.findall(r"`([\w-]+)`", slugs)
        assert len(of_row) in {1, len(names)}
        told |= set(zip(of_row * (len(names) // len(of_row)), names))
    assert told == {(kind.status, kind.slug) for kind in KINDS}


def shown(value: object) -> str:
    """A setting's default as the README writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value or (value if value == 0 else ""))


def test_every_setting_and_its_default_is_documented() -> None:
    rows = re.findall(r"^\| (`LIMPID_[^|]*)\|([^|]*)\|", (ROOT / "README.md").read_text(), re.M)
    told = {
        name: default.strip("`")
        for names, defaults in rows
        for name, default in zip(re.findall(r"`(\w+)`", names), defaults.strip().split(", "))
    }
    fields = {f"LIMPID_{name.upper()}": field.default for name, field in Settings.model_fields.items()}
    fields["LIMPID_STORE"] = "model_store"
    assert told == {name: shown(default) for name, default in fields.items()}


def test_every_series_is_documented() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    names = [family.name for family in Service(Settings()).metrics.registry.collect()]
    ours = [name.removeprefix("limpid_") for name in names if name.startswith("limpid_")]
    assert len(ours) > 15
    assert [name for name in ours if f"`{name}" not in page] == []


def test_every_command_is_documented() -> None:
    pages = "\n".join((ROOT / page).read_text() for page in PAGES)
    commands = re.findall(r"add_parser\(\"(\w+)\"", (ROOT / "service/cli.py").read_text())
    assert len(commands) > 8
    assert [name for name in commands if not re.search(rf"limpid (store )?{name}\b", pages)] == []


def test_the_costs_in_the_readme_are_counted() -> None:
    done = subprocess.run([sys.executable, "-m", "service.codec.cost"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in (ROOT / "README.md").read_text()


RESULTS = ROOT / "model_store/evaluation/results"
UPLOADS = {
    "clean": ("kodak", "clean"),
    "Gaussian noise, sigma 15": ("kodak", "noise-15"),
    "Gaussian noise, sigma 25": ("kodak", "noise-25"),
    "Gaussian noise, sigma 50": ("kodak", "noise-50"),
    "sensor noise, level 2 of 4": ("kodak", "sensor-2"),
    "rain, synthetic": ("kodak", "rain"),
    "snow, synthetic": ("kodak", "snow"),
    "haze, synthetic": ("kodak", "haze"),
    "low light, synthetic": ("kodak", "low-light"),
    "rain drawn by others, 10 photos": ("rain", "pairs"),
    "real camera noise, 8 photos": ("cc15", "pairs"),
}
PEER_COLUMNS = {"JPEG": "JPEG", "WebP": "WEBP", "AVIF (speed 6)": "AVIF", "denoised, then AVIF": "NLM+AVIF"}


def measured(*kinds: str) -> list[Record]:
    """All records of `KIND-SET.json`."""
    sets = {name for name, _ in UPLOADS.values()}
    paths = [RESULTS / f"{kind}-{name}.json" for kind in kinds for name in sets]
    return read_records(path for path in paths if path.exists())


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    text = (ROOT / "README.md").read_text()
    head, rows = re.findall(r"^\| upload \|(.*)\|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)[0]
    columns = [name.strip() for name in head.split("|")][1:]
    peers = measured("peers", "cascade")
    told = {label: cells for label, *cells in (
        [cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()
    )}  # fmt: skip
    assert told.keys() == UPLOADS.keys()
    for number, column in enumerate(columns):
        model = re.fullmatch(r"Limpid `(.*)`", column)
        codec = "LIMPID" if model else PEER_COLUMNS[column]
        of_codec = curves(measured(model[1]) if model else peers)
        for label, (name, condition) in UPLOADS.items():
            curve = of_codec.get((name, condition, codec))
            value = curve.psnr_within(0.5) if curve else None
            assert told[label][number + 1] == ("" if value is None else f"{value:.2f}"), (label, column)
    for label, (name, condition) in UPLOADS.items():
        assert told[label][0] == ("" if condition == "clean" else f"{input_psnr(peers, name, condition):.2f}"), label


def test_what_the_readme_says_of_the_default_model_was_measured() -> None:
    text, name = (ROOT / "README.md").read_text(), ModelStore(DEFAULT_STORE).index.default
    naming, copies = (
        json.loads((RESULTS / f"{name}-{trial}.json").read_text())["summary"] for trial in ("naming", "generations")
    )
    assert f"of `{name}` names {100 * naming['right']:.1f}% of Kodak's photos" in text
    told = re.search(r"a clean photo loses\s+(\S+) dB \(rate 6, worst of Kodak (\S+)\)", text)
    assert told
    assert told.groups() == (f"{copies['mean_loss_db']:.2f}", f"{copies['largest_loss_db']:.2f}")
    ours, theirs = curves(measured(name)), curves(measured("cascade"))
    saved = [
        bd_rate(ours["kodak", noise, "LIMPID"], theirs["kodak", noise, "NLM+AVIF"])
        for noise in ("noise-15", "noise-25")
    ]
    told = re.search(rf"`{name}` takes (\d+)% fewer bits than it and AVIF at sigma 15, (\d+)% fewer at sigma 25", text)
    assert told
    assert [-int(percent) for percent in told.groups()] == [round(change or 0) for change in saved]


def test_what_effort_saves_was_measured() -> None:
    told = (ROOT / "docs/models.md").read_text()
    files = sorted(RESULTS.glob("*-effort-*.json"))
    assert files
    for path in files:
        name = path.name.partition("-effort-")[0]
        for row in effort_table(read_records([path])).splitlines()[2:]:
            assert f"| `{name}` {row}" in told
    refined, theirs = curves(read_records([RESULTS / "base-2-effort-noise-15.json"])), curves(measured("cascade"))
    saved = re.search(
        r"`base-2` takes (\d+)% fewer bits without effort and (\d+)% fewer with effort 4 than a denoiser", told
    )
    assert saved
    for percent, effort in zip(saved.groups(), ("effort-0", "effort-4")):
        change = bd_rate(refined["kodak", "noise-15", effort], theirs["kodak", "noise-15", "NLM+AVIF"])
        assert -int(percent) == round(change or 0)
    name = ModelStore(DEFAULT_STORE).index.default
    files = [RESULTS / f"{model}-effort-clean.json" for model in (name, "base-2")]
    found = [curves(read_records([path])) for path in files]
    pairs = [(one["kodak", "clean", "effort-0"], one["kodak", "clean", "effort-4"]) for one in found]
    within = pairs[0][1].psnr_within(0.5) or 0.0
    assert f"`{name}` reaches {within:.2f} dB" in (ROOT / "README.md").read_text()
    more = [
        100 * (b / a - 1)
        for none, four in pairs
        for rate, a, b in zip(none.setting, none.bpp, four.bpp)
        if rate in (4, 5, 6)
    ]
    better = [
        b - a for none, four in pairs for rate, a, b in zip(none.setting, none.psnr, four.psnr) if rate in (4, 5, 6)
    ]
    assert f"({min(more):+.1f} to {max(more):+.1f}%)" in told
    assert f"{min(better):.2f} to {max(better):.2f} dB better" in told
    at_equal_size = [
        gain
        for none, four in pairs
        for curve, other, sign in ((none, four, 1), (four, none, -1))
        for bpp, psnr in zip(curve.bpp, curve.psnr)
        if other.bpp[0] <= bpp <= other.bpp[-1]
        for gain in [sign * (other.psnr_at(bpp) - psnr)]
    ]
    least, most = min(at_equal_size), max(at_equal_size)
    assert f"{least:.1f} to {most:.1f} dB better at equal size" in (ROOT / "README.md").read_text()
