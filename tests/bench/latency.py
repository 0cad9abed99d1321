"""`python -m tests.bench.latency`: the served latency and memory of one photo at a time.

Starts the real server, sends a 768x512 photo both ways over HTTP, prints medians and the server's resident memory, and
writes JSON with the machine's facts. A benchmark, not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2
import numpy as np
import psutil

from tests.bench.machine import machine, result_file
from tests.conftest import image_bytes, noisy, photo
from tests.served import served


@dataclass(frozen=True)
class Row:
    """Wall-clock milliseconds of one call over HTTP."""

    operation: str
    rate: int
    bytes_in: int
    bytes_out: int
    median_ms: float
    worst_ms: float
    server_timing: str


def _measure(call: Callable[[], httpx2.Response], repeats: int) -> tuple[httpx2.Response, float, float]:
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        answer = call()
        seconds.append(time.perf_counter() - started)
        answer.raise_for_status()
    return answer, 1000 * statistics.median(seconds), 1000 * max(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.latency", description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--model", help="of the store; its default otherwise")
    parser.add_argument("--json", type=Path, help="default: a file per precision, and per model that is named")
    args = parser.parse_args()
    output = args.json or result_file(f"latency-{args.model}" if args.model else "latency")
    chosen = {"model": args.model} if args.model else {}
    upload = image_bytes(noisy(np.tile(photo("parrots"), (2, 3, 1))))
    rows = []
    with served() as (base, process), httpx2.Client(base_url=base, timeout=120) as client:
        started = psutil.Process(process.pid).memory_info().rss
        for rate in (1, 4, 8):

            def compress(rate: int = rate) -> httpx2.Response:
                return client.post("/compress", params={"rate": rate, **chosen}, content=upload)

            sent, median, worst = _measure(compress, args.repeats)
            stream = sent.content
            rows.append(Row("compress", rate, len(upload), len(stream), median, worst, sent.headers["server-timing"]))

            def decompress(stream: bytes = stream) -> httpx2.Response:
                return client.post("/decompress", content=stream)

            back, median, worst = _measure(decompress, args.repeats)
            timing = back.headers["server-timing"]
            rows.append(Row("decompress", rate, len(stream), len(back.content), median, worst, timing))
        resident = psutil.Process(process.pid).memory_info().rss
    for row in rows:
        print(f"{row.operation:10} rate {row.rate}: median {row.median_ms:6.0f} ms, worst {row.worst_ms:6.0f} ms")
        print(f"           {row.server_timing}")
    print(f"resident memory: {started / 2**20:.0f} MiB once ready, {resident / 2**20:.0f} MiB after the run")
    report = {
        "photo": "768x512",
        "model": sent.headers["limpid-model"],
        "repeats": args.repeats,
        "machine": machine(),
        "resident_mib_ready": round(started / 2**20),
        "resident_mib_after": round(resident / 2**20),
        "rows": [asdict(row) for row in rows],
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
