"""Fixtures: photos that ship with the tests, the shipped store on an engine, and a served app."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from service.app import create_app
from service.codec.shipped import ShippedCodec
from service.engine import Engine, Photo
from service.settings import Settings
from service.store import ModelStore

DATA = Path(__file__).parent / "data"


def photo(name: str) -> Photo:
    with Image.open(DATA / f"{name}.png") as image:
        return np.asarray(image.convert("RGB"))


def noisy(clean: Photo, sigma: float = 25, seed: int = 1234) -> Photo:
    noise = np.random.default_rng(seed).normal(0, sigma, clean.shape)
    return np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)


def psnr(a: Photo, b: Photo) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def image_bytes(pixels: Photo | Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def parrots() -> Photo:
    return photo("parrots")


@pytest.fixture(scope="session")
def bikes() -> Photo:
    return photo("bikes")


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(max_pixels=4_000_000, max_body_bytes=8 * 2**20)


@pytest.fixture(scope="session")
def engine(settings: Settings) -> Engine:
    return Engine(ModelStore(settings.store), settings.device, settings.precision)


@pytest.fixture(scope="session")
def codec(engine: Engine) -> ShippedCodec:
    return engine.default.codec


@pytest.fixture(scope="session")
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        deadline = time.monotonic() + 120
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline, client.get("/readyz").text
            time.sleep(0.2)
        yield client


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(request.param, os.cpu_count() or 1))
    yield request.param
    torch.set_num_threads(before)
