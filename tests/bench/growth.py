"""`python -m tests.bench.growth`: how time and memory grow with pixels, batch size and concurrent clients.

Writes JSON and one figure with three plots; the first two have a dashed line for linear growth, that of pixels from its
second point on. A benchmark, not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx2
from matplotlib.figure import Figure

from service.engine import EncodeJob, Engine
from service.settings import Settings
from service.store import ModelStore
from tests.bench.load import upload
from tests.bench.machine import machine, result_file
from tests.bench.speed import large, seconds
from tests.served import served

SIZES = ((256, 384), (512, 768), (1024, 1536), (2000, 3000), (3000, 4000), (4480, 5580), (6000, 8333))
BATCHES, CLIENTS = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32)


def by_clients(count: int, photo: bytes, base: str, duration: float = 6) -> float:
    """Photos per second of so many clients that each wait for their answer."""
    ends = time.monotonic() + duration

    def client(_: int) -> int:
        done = 0
        with httpx2.Client(base_url=base, timeout=60) as http:
            while time.monotonic() < ends:
                http.post("/compress", content=photo).raise_for_status()
                done += 1
        return done

    started = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        done = sum(pool.map(client, range(count)))
    return done / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.growth", description=__doc__)
    parser.parse_args()
    pixels = [large(height, width) for height, width in SIZES]
    engine = Engine(ModelStore(Settings().store), "cpu")
    photo, data = upload()
    batches = []
    for size in BATCHES:
        jobs = [EncodeJob(photo, 4)] * size
        streams = engine.encode(jobs)
        batches.append({
            "batch": size,
            "compress_s": seconds(partial(engine.encode, jobs), 3),
            "decompress_s": seconds(partial(engine.decode, streams), 3),
        })  # fmt: skip
    engine.close()
    with served() as (base, _):
        by_clients(1, data, base, 2)
        clients = [{"clients": count, "photos_per_s": by_clients(count, data, base)} for count in CLIENTS]
    report = {"machine": machine(), "pixels": pixels, "batches": batches, "clients": clients}
    result_file("growth").write_text(json.dumps(report, indent=2) + "\n")
    draw(pixels, batches, clients)


def draw(pixels: list[dict[str, float]], batches: list[dict[str, float]], clients: list[dict[str, float]]) -> None:
    """The figure; prints the rows too."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    time_axes, batch_axes, client_axes = figure.subplots(1, 3)
    x = [row["megapixels"] for row in pixels]
    for way in ("compress", "decompress"):
        time_axes.loglog(x, [row[f"{way}_s"] for row in pixels], "o-", label=f"{way}, s")
        batch_axes.plot(BATCHES, [row[f"{way}_s"] for row in batches], "o-", label=f"{way}, s")
    first = pixels[1]
    time_axes.loglog(x, [first["compress_s"] * one / first["megapixels"] for one in x], "k--", lw=0.8, label="linear")
    memory = [(row["peak_mib"] - row["idle_mib"]) / 1024 for row in pixels]
    time_axes.loglog(x, memory, "s:", label="memory above idle, GiB")
    time_axes.set(xlabel="megapixels", title="one photo")
    batch_axes.plot(BATCHES, [batches[0]["compress_s"] * size for size in BATCHES], "k--", lw=0.8, label="linear")
    batch_axes.set(xlabel="photos in a batch, 768x512", title="bare engine")
    client_axes.plot(CLIENTS, [row["photos_per_s"] for row in clients], "o-", label="photos/s, /compress")
    client_axes.set(xlabel="concurrent clients", title="service", ylim=0)
    for axes in (time_axes, batch_axes, client_axes):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(result_file("growth", "png"), dpi=110)
    for row in (*pixels, *batches, *clients):
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
