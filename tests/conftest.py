"""Fixtures: photos that ship with the tests, stores, the shipped one on an engine and served, a server with a key."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from starlette.testclient import TestClient

from model_store.index import read_model
from service.app import create_app
from service.codec.shipped import ShippedCodec
from service.engine import Engine, Photo
from service.settings import DEFAULT_STORE, Settings
from service.store import ModelStore, StoreIndex
from tests.served import served

DATA = Path(__file__).parent / "data"

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)  # a busy machine is no failure
hypothesis.settings.load_profile("suite")


def photo(name: str) -> Photo:
    with Image.open(DATA / f"{name}.png") as image:
        return np.asarray(image.convert("RGB"))


def noisy(clean: Photo, sigma: float = 25, seed: int = 1234) -> Photo:
    noise = np.random.default_rng(seed).normal(0, sigma, clean.shape)
    return np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)


def image_bytes(pixels: Photo | Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def other_store(folder: Path, name: str, moved_by: float = 1.001) -> ModelStore:
    """A store that holds one model: the default of the shipped store with one weight of g_s moved a little."""
    shipped = ModelStore(DEFAULT_STORE)
    entry = shipped.entry(shipped.index.default)
    model = read_model(DEFAULT_STORE)
    tensors = model.tensors
    moved = next(key for key in tensors if key.startswith("g_s") and tensors[key].is_floating_point())
    tensors[moved] = tensors[moved] * moved_by
    data = save(tensors, {"limpid": model.description})
    changed = {"name": name, "file": f"{name}.safetensors", "sha256": hashlib.sha256(data).hexdigest()}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.safetensors").write_bytes(data)
    index = StoreIndex(default=name, models=[entry.model_copy(update=changed)])
    (folder / "store.json").write_text(index.model_dump_json())
    return ModelStore(folder)


def copied_store(folder: Path) -> ModelStore:
    """A store of its own that holds the default model of the shipped one."""
    shipped = ModelStore(DEFAULT_STORE)
    entry = shipped.entry(shipped.index.default)
    folder.mkdir(exist_ok=True)
    shutil.copy(DEFAULT_STORE / entry.file, folder)
    (folder / "store.json").write_text(StoreIndex(default=entry.name, models=[entry]).model_dump_json())
    return ModelStore(folder)


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something holds.

    Raises:
        AssertionError: it does not in time.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_ready(client: TestClient, seconds: float = 120) -> None:
    """Until the models are loaded.

    Raises:
        AssertionError: they are not in time, or never will be.
    """

    def ready() -> bool:
        answer = client.get("/readyz")
        assert answer.status_code == 200 or "still loading" in answer.text
        return answer.status_code == 200

    until(ready, seconds)


@pytest.fixture(scope="session")
def parrots() -> Photo:
    return photo("parrots")


@pytest.fixture(scope="session")
def bikes() -> Photo:
    return photo("bikes")


@pytest.fixture(scope="session", autouse=True)
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What services and commands open unless a test says otherwise: the default model alone, which loads sooner."""
    folder = copied_store(tmp_path_factory.mktemp("small") / "store").folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMPID_STORE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(store=DEFAULT_STORE, max_pixels=4_000_000, max_body_bytes=8 * 2**20)


@pytest.fixture(scope="session")
def engine(settings: Settings) -> Engine:
    return Engine(ModelStore(settings.store), settings.device, settings.precision)


@pytest.fixture(scope="session")
def codec(engine: Engine) -> ShippedCodec:
    return engine.default.codec


@pytest.fixture(scope="session")
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        wait_ready(client)
        yield client


@pytest.fixture(scope="session")
def guarded() -> Iterator[str]:
    """A real server that wants the key `sesame`."""
    with served(api_keys="sesame") as (base, _):
        yield base


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(request.param, os.cpu_count() or 1))
    yield request.param
    torch.set_num_threads(before)
