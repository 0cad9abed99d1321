"""`python -m tests.bench.fuzz`: mutated bitstreams and images through the real calls of the whole app.

Every answer must be a 4xx or a valid 200, none may take over two seconds, and memory must not grow. The tests run a
short, seeded share of it (`tests/test_fuzz.py`); this command runs the long one and prints what it saw.
"""

from __future__ import annotations

import argparse
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import google_crc32c
import numpy as np
import psutil
from starlette.testclient import TestClient

from service.app import create_app
from service.imaging import read_photo
from service.settings import Settings
from tests.conftest import image_bytes, photo, wait_ready


@dataclass
class Seen:
    """What a run of mutations led to."""

    statuses: Counter[int] = field(default_factory=Counter)
    slowest_s: float = 0.0
    rss_before: int = 0
    rss_after: int = 0
    bad: list[str] = field(default_factory=list)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """A few of: bytes replaced, bits flipped, pieces cut out, doubled, moved or filled; the end cut off."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not out:
            break
        at = int(rng.integers(0, len(out)))
        length = int(rng.integers(1, 40))
        choice = int(rng.integers(0, 7))
        if choice == 0:
            out[at] = int(rng.integers(0, 256))
        elif choice == 1:
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif choice == 2:
            del out[at : at + length]
        elif choice == 3:
            out[at:at] = out[at : at + length]
        elif choice == 4:
            out[at : at + length] = bytes([int(rng.choice([0, 255, 127]))]) * length
        elif choice == 5:
            out[at : at + length] = rng.integers(0, 256, length, np.uint8).tobytes()
        else:
            del out[at:]
    return bytes(out)


def reseal(stream: bytes) -> bytes:
    """Give a mutated stream a right checksum, so that the mutation reaches the decoder."""
    body = stream[:-4]
    return body + struct.pack("<I", google_crc32c.value(body))


def fuzz_client(settings: Settings) -> TestClient:
    return TestClient(create_app(settings), raise_server_exceptions=False)


def run(count: int, seed: int, make: Callable[[np.random.Generator], tuple[str, bytes]], client: TestClient) -> Seen:
    """Post `count` mutations and watch."""
    rng, seen = np.random.default_rng(seed), Seen()
    process = psutil.Process()
    for index in range(count):
        path, body = make(rng)
        started = time.perf_counter()
        answer = client.post(path, content=body)
        seen.slowest_s = max(seen.slowest_s, time.perf_counter() - started)
        seen.statuses[answer.status_code] += 1
        if answer.status_code == 200 and path == "/decompress":
            read_photo(answer.content, 10**7)
        elif answer.status_code != 200 and not 400 <= answer.status_code < 500:
            seen.bad.append(f"{path} {answer.status_code}: {body[:80].hex()}")
        if index == count // 4:
            seen.rss_before = process.memory_info().rss
    seen.rss_after = process.memory_info().rss
    return seen


def bitstreams(client: TestClient) -> Callable[[np.random.Generator], tuple[str, bytes]]:
    """Mutations of real streams at several rates, half of them with a right checksum."""
    pixels = photo("bikes")[:48, :64]
    streams = [client.post("/compress", content=image_bytes(pixels), params={"rate": r}).content for r in (1, 4, 8)]

    def make(rng: np.random.Generator) -> tuple[str, bytes]:
        mutated = mutate(streams[int(rng.integers(0, 3))], rng)
        return "/decompress", reseal(mutated) if rng.random() < 0.5 else mutated

    return make


def images() -> Callable[[np.random.Generator], tuple[str, bytes]]:
    """Mutations of small images of every format."""
    pixels = photo("bikes")[:40, :56]
    files = [image_bytes(pixels, name) for name in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP")]

    def make(rng: np.random.Generator) -> tuple[str, bytes]:
        return "/compress", mutate(files[int(rng.integers(0, len(files)))], rng)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fuzz", description=__doc__)
    parser.add_argument("--bitstreams", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with fuzz_client(Settings(max_pixels=1_000_000, log_level="error")) as client:
        wait_ready(client)
        makers = {"bitstreams": (args.bitstreams, bitstreams(client)), "images": (args.images, images())}
        for name, (count, make) in makers.items():
            seen = run(count, args.seed, make, client)
            growth = (seen.rss_after - seen.rss_before) / 2**20
            print(f"{name}: {count}, statuses {dict(seen.statuses)}")
            print(f"{name}: slowest {seen.slowest_s:.2f} s, memory {growth:+.1f} MiB, {len(seen.bad)} bad answers")
            for line in seen.bad[:10]:
                print(f"  {line}")


if __name__ == "__main__":
    main()
