"""`python -m tests.bench.load [--only NAME ...]`: the service under load, on a real server, beside the bare engine.

    throughput  1 and 32 concurrent clients against the bare engine; batch sizes
    latency     one client on an idle service against the bare engine call plus image decode
    overload    four times the capacity for a minute: statuses, time to a 429, deadlines, memory
    mixed       1,000 requests with corrupt bodies, hang-ups, mixed sizes and rates
    drain       SIGTERM under load

Prints a line per figure and saves JSON. A benchmark, not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import cast

import httpx2
import numpy as np
import psutil

from service.codec.bitstream import Bitstream, BitstreamError
from service.engine import EncodeJob, Engine, Photo
from service.imaging import read_photo
from service.settings import Settings
from service.store import ModelStore
from tests.bench.machine import machine, result_file
from tests.conftest import image_bytes, noisy, photo
from tests.served import served

Report = dict[str, object]


def upload(height: int = 512, width: int = 768, seed: int = 1) -> tuple[Photo, bytes]:
    """A noisy photo of some size and its JPEG upload."""
    tiled = np.tile(photo("parrots"), (-(-height // 256), -(-width // 256), 1))[:height, :width]
    data = image_bytes(noisy(tiled, 15, seed), "JPEG", quality=92)
    return read_photo(data, 10**8), data


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, 100 * share)) if values else float("nan")


def bare_engine(engine: Engine, pixels: Photo, batch: int, seconds: float) -> float:
    """Photos per second of `engine.encode` in batches, nothing around it."""
    jobs = [EncodeJob(pixels, 4) for _ in range(batch)]
    engine.encode(jobs)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        engine.encode(jobs)
        done += batch
    return done / (time.perf_counter() - started)


async def closed_loop(base: str, data: bytes, clients: int, requests: int) -> list[tuple[int, float]]:
    """(status, seconds) of `requests` compress calls by so many clients, each sending its next after its answer."""
    left, results = iter(range(requests)), []
    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(base_url=base, timeout=120, limits=limits) as client:

        async def one_client() -> None:
            for _ in left:
                started = time.perf_counter()
                answer = await client.post("/compress", content=data)
                results.append((answer.status_code, time.perf_counter() - started))

        await asyncio.gather(*(one_client() for _ in range(clients)))
    return results


def batch_totals(base: str) -> tuple[float, float]:
    """(batches, items) so far."""
    lines = httpx2.get(f"{base}/metrics").text.splitlines()
    totals = [
        sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"limpid_batch_size_{kind}{{"))
        for kind in ("count", "sum")
    ]
    return totals[0], totals[1]


def throughput(report: Report, rounds: int = 3) -> None:
    """Bare engine and service take turns, so that a machine whose speed drifts treats both alike; medians of rounds."""
    pixels, data = upload()
    settings = Settings()
    engine = Engine(ModelStore(settings.store), settings.device, settings.precision)
    bare: dict[int, list[float]] = {1: [], 16: []}
    rates: dict[int, list[float]] = {1: [], 4: [], 16: [], 32: []}
    batches: dict[int, float] = {}
    statuses: Counter[int] = Counter()
    with served() as (base, _):
        asyncio.run(closed_loop(base, data, 1, 5))
        for _ in range(rounds):
            for batch, found in bare.items():
                found.append(bare_engine(engine, pixels, batch, 5))
            for clients, found in rates.items():
                before = batch_totals(base)
                started = time.perf_counter()
                results = asyncio.run(closed_loop(base, data, clients, max(40, 3 * clients)))
                found.append(len(results) / (time.perf_counter() - started))
                after = batch_totals(base)
                batches[clients] = (after[1] - before[1]) / (after[0] - before[0])
                statuses += Counter(status for status, _ in results)
    bare_rate = max(median(found) for found in bare.values())
    rows = {n: {"photos_per_second": median(found), "mean_batch": batches[n]} for n, found in rates.items()}
    for clients, row in rows.items():
        print(f"throughput: {clients:2} clients {row['photos_per_second']:6.2f} photos/s, "
              f"mean batch {row['mean_batch']:.2f}")  # fmt: skip
    text = ", ".join(f"{median(found):.2f} photos/s in batches of {batch}" for batch, found in bare.items())
    print(f"throughput: bare engine {text}; statuses {dict(statuses)}")
    print(f"throughput: 32 clients / 1 client {rows[32]['photos_per_second'] / rows[1]['photos_per_second']:.2f}")
    print(f"throughput: 32 clients / bare engine {rows[32]['photos_per_second'] / bare_rate:.2f}")
    report["throughput"] = {"bare_engine": bare, "clients": rows, "rounds": rates, "statuses": statuses}


def latency(report: Report) -> None:
    pixels, data = upload()
    settings = Settings()
    engine = Engine(ModelStore(settings.store), settings.device, settings.precision)

    def timed(call: Callable[[], object]) -> float:
        call()
        seconds = []
        for _ in range(30):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        return median(seconds)

    bare = timed(lambda: engine.encode([EncodeJob(pixels, 4)])[0].to_bytes()) + timed(lambda: read_photo(data, 10**8))
    with served() as (base, _), httpx2.Client(base_url=base, timeout=60) as client:
        whole = timed(lambda: client.post("/compress", content=data).raise_for_status())
    print(f"latency: service {1000 * whole:.0f} ms, engine and decode {1000 * bare:.0f} ms, ratio {whole / bare:.2f}")
    report["latency"] = {"service_s": whole, "engine_and_decode_s": bare, "ratio": whole / bare}


def overload(report: Report, seconds: float = 60) -> None:
    _, data = upload()

    async def run(base: str, process: psutil.Process) -> Report:
        results = await closed_loop(base, data, 8, 40)
        begun = time.perf_counter()
        results = await closed_loop(base, data, 8, 40)
        capacity = len(results) / (time.perf_counter() - begun)
        answers: list[tuple[int, float]] = []
        wrong = 0
        memory: list[float] = []
        async with httpx2.AsyncClient(base_url=base, timeout=120, limits=httpx2.Limits(max_connections=None)) as client:

            async def one() -> None:
                nonlocal wrong
                started = time.perf_counter()
                answer = await client.post("/compress", content=data)
                answers.append((answer.status_code, time.perf_counter() - started))
                if answer.status_code == 200:
                    try:
                        stream = Bitstream.from_bytes(answer.content)
                        wrong += (stream.width, stream.height, stream.rate) != (768, 512, 4)
                    except BitstreamError:
                        wrong += 1

            tasks: list[asyncio.Task[None]] = []
            start = time.perf_counter()
            while (now := time.perf_counter() - start) < seconds:
                while len(tasks) < now * 4 * capacity:
                    tasks.append(asyncio.create_task(one()))
                if len(memory) <= now:
                    memory.append(process.memory_info().rss / 2**20)
                await asyncio.sleep(0.005)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        errors = Counter(type(outcome).__name__ for outcome in outcomes if isinstance(outcome, BaseException))
        fast = [s for status, s in answers if status == 429]
        good = [s for status, s in answers if status == 200]
        return {
            "capacity_per_s": capacity,
            "offered_per_s": len(tasks) / seconds,
            "statuses": Counter(status for status, _ in answers),
            "transport_errors": errors,
            "wrong_answers": wrong,
            "p99_of_429_ms": 1000 * percentile(fast, 0.99),
            "worst_admitted_s": max(good),
            "memory_mib": [round(value) for value in memory],
        }

    with served() as (base, process):
        result = asyncio.run(run(base, psutil.Process(process.pid)))
    memory = cast(list[int], result["memory_mib"])
    say = [
        f"offered {result['offered_per_s']:.1f}/s, capacity {result['capacity_per_s']:.1f}/s",
        f"statuses {result['statuses']}, errors {result['transport_errors']}, wrong {result['wrong_answers']}",
        f"p99 of a 429 {result['p99_of_429_ms']:.0f} ms, slowest admitted {result['worst_admitted_s']:.1f} s",
        f"memory {memory[min(10, len(memory) - 1)]} MiB after 10 s, {max(memory[10:] or memory)} at most later",
    ]
    print("\n".join(f"overload: {line}" for line in say))
    report["overload"] = result


def mixed(report: Report, requests: int = 1000) -> None:
    rng = np.random.default_rng(5)
    sizes = [(64, 64), (96, 160), (250, 131), (256, 256), (512, 768)]
    good = [upload(h, w, seed) for seed, (h, w) in enumerate(sizes)]

    async def run(base: str) -> Report:
        outcome: Counter[str] = Counter()
        gate = asyncio.Semaphore(24)
        async with httpx2.AsyncClient(base_url=base, timeout=120, limits=httpx2.Limits(max_connections=None)) as client:

            async def corrupt(index: int) -> None:
                body = good[index % 5][1]
                bad = [body[: len(body) // 2], b"text" * 50, b"", body[:20] + bytes(200)][index % 4]
                answer = await client.post("/compress", content=bad)
                outcome["corrupt 4xx" if 400 <= answer.status_code < 500 else f"corrupt {answer.status_code}"] += 1

            async def hang_up(index: int) -> None:
                try:
                    await client.post("/compress", content=good[4][1], timeout=0.05)
                    outcome["answered before it hung up"] += 1
                except httpx2.TimeoutException:
                    outcome["hung up"] += 1

            async def whole(index: int) -> None:
                pixels, body = good[index % 5]
                rate = 1 + index % 8
                for _ in range(20):
                    sent = await client.post("/compress", content=body, params={"rate": rate})
                    if sent.status_code != 429:
                        break
                    await asyncio.sleep(float(sent.headers["retry-after"]))
                if sent.status_code != 200:
                    outcome[f"good {sent.status_code}"] += 1
                    return
                back = await client.post("/decompress", content=sent.content)
                right = back.status_code == 200 and read_photo(back.content, 10**8).shape == pixels.shape
                outcome["good right" if right else f"good wrong {back.status_code}"] += 1

            async def one(index: int, kind: Callable[[int], Awaitable[None]]) -> None:
                async with gate:
                    await kind(index)

            draws = rng.random(requests)
            kinds = [corrupt if draw < 0.1 else hang_up if draw < 0.15 else whole for draw in draws]
            await asyncio.gather(*(one(index, kind) for index, kind in enumerate(kinds)))
        lines = (await asyncio.to_thread(httpx2.get, f"{base}/metrics")).text.splitlines()
        outcome["5xx seen by the service"] = int(
            sum(
                float(line.rsplit(" ", 1)[1])
                for line in lines
                if line.startswith("limpid_http_requests_total") and 'press",status="5' in line
            )
        )
        return {"outcomes": outcome}

    with served() as (base, _):
        result = asyncio.run(run(base))
    print(f"mixed: {result['outcomes']}")
    report["mixed"] = result


def drain(report: Report) -> None:
    _, data = upload()
    with served(drain_grace_s=60) as (base, process):

        async def run() -> Counter[str]:
            outcome: Counter[str] = Counter()
            async with httpx2.AsyncClient(base_url=base, timeout=120) as client:

                async def one() -> None:
                    try:
                        answer = await client.post("/compress", content=data)
                        outcome[str(answer.status_code)] += 1
                    except httpx2.TransportError as error:
                        outcome[type(error).__name__] += 1

                first = [asyncio.create_task(one()) for _ in range(32)]
                until = time.monotonic() + 60
                while time.monotonic() < until:  # a fast device may never have so many
                    text = (await client.get("/metrics")).text
                    admitted = [line for line in text.splitlines() if "in_progress" in line and '"compress"' in line]
                    if admitted and float(admitted[0].rsplit(" ", 1)[1]) >= 32:
                        break
                process.send_signal(signal.SIGTERM)
                await asyncio.gather(*first)
            return outcome

        outcome = asyncio.run(run())
        status = process.wait(60)
    print(f"drain: of 32 admitted requests {dict(outcome)}; exit status {status}")
    report["drain"] = {"outcomes": outcome, "exit_status": status}


PARTS: dict[str, Callable[[Report], None]] = {
    "throughput": throughput,
    "latency": latency,
    "overload": overload,
    "mixed": mixed,
    "drain": drain,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, default=result_file("load"))
    args = parser.parse_args()
    earlier: Report = json.loads(args.json.read_text()) if args.json.exists() else {}
    report: Report = {"machine": machine()} | {name: earlier[name] for name in PARTS if name in earlier}
    for name in args.only:
        PARTS[name](report)
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
