"""`python -m tests.bench.speed` (`make bench`): speed and memory beside the peers, all measured in one run.

    peers    compress and decompress of one 768x512 photo: ours; CompressAI's mbt2018-mean and cheng2020-attn and our
             own paper-s with random weights (nothing pretrained can be had here; the arithmetic is the same)
    share    the transforms' arithmetic per second against the best bare convolution and matrix product of this machine
    exact    what part of the time is entropy coding and the exact path
    memory   a photo of 12 and one of 50 megapixels, each in its own process
    startup  from the start of the process to ready, and how much of it are imports of others

All torch work is done in the engine's thread: see `Engine.on_device`.

Prints a table with the goals and writes JSON. A benchmark, not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from model_store.images import as_tensor
from service.codec.config import CONFIGS
from service.codec.cost import cost
from service.codec.model import TrainableCodec, ship
from service.codec.shipped import Coded, ShippedCodec, latent_size, pad_to_stride
from service.engine import EncodeJob, Engine, Photo, StageTimes
from service.settings import Settings
from service.store import ModelStore
from tests.bench.load import upload
from tests.bench.machine import machine, result_file
from tests.served import served

PIXELS = 768 * 512

TURNS, TURN_SECONDS = 4, 0.4


def seconds(call: Callable[[], object], repeats: int, warm: int = 1) -> float:
    """Median seconds of a call."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return median(times)


def by_turns(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each call.

    They take turns: where machines are shared, speed changes by a third from minute to minute, and ratios shall not.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(1 + TURNS):  # the first one warms up
        for name, call in calls.items():
            ends = time.perf_counter() + TURN_SECONDS
            while True:
                took = seconds(call, 1, 0)
                if turn:
                    times[name].append(took)
                if time.perf_counter() >= ends:
                    break
    return {name: median(each) for name, each in times.items()}


def peers(engine: Engine, photo: Photo) -> dict[str, dict[str, float]]:
    """Seconds each way, per codec."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressai.zoo import cheng2020_attn, mbt2018_mean
    job = [EncodeJob(photo, 4)]
    stream = engine.encode(job)
    calls: dict[str, Callable[[], object]] = {}

    def add(name: str, compress: Callable[[], object], decompress: Callable[[], object]) -> None:
        calls[f"{name} compress"] = partial(engine.on_device, compress)
        calls[f"{name} decompress"] = partial(engine.on_device, decompress)

    def prepare() -> None:
        x = as_tensor(photo)
        for name, make in (("mbt2018-mean", mbt2018_mean), ("cheng2020-attn", cheng2020_attn)):
            torch.manual_seed(1)
            model = make(4, pretrained=False).eval()
            model.update()
            packed = model.compress(x)
            add(name, partial(model.compress, x), partial(model.decompress, packed["strings"], packed["shape"]))
        torch.manual_seed(1)
        ours = TrainableCodec(CONFIGS["paper-s"]).eval()
        codec = ShippedCodec.from_tensors(*ship(ours), engine.device, getattr(torch, engine.precision))
        rate, padded, size = torch.tensor([3]), pad_to_stride(x), latent_size(*photo.shape[:2])

        def compress() -> Coded:
            return codec.write(codec.symbols_of(*codec.analyse(padded, rate)[:2], rate)[0])

        coded = compress()
        add("paper-s", compress, lambda: codec.synthesise(codec.read([coded], rate, *size), rate))

    engine.on_device(prepare)
    calls["edge compress"] = lambda: engine.encode(job)[0].to_bytes()
    calls["edge decompress"] = lambda: engine.decode(stream)
    found: dict[str, dict[str, float]] = {}
    for call, took in by_turns(calls).items():
        name, way = call.split()
        found.setdefault(name, {})[way] = took
    return found


def bare(dtype: torch.dtype) -> dict[str, tuple[float, Callable[[], object]]]:
    """Bare convolutions and a bare matrix product in `dtype`, with their floating-point operations."""
    calls: dict[str, tuple[float, Callable[[], object]]] = {}
    for channels, kernel, height, width in ((128, 3, 64, 96), (256, 3, 64, 96), (192, 1, 128, 192), (512, 1, 64, 96)):
        x = torch.rand(1, channels, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.rand(channels, channels, kernel, kernel).to(dtype).contiguous(memory_format=torch.channels_last)
        flops = 2.0 * channels**2 * kernel**2 * height * width
        calls[f"convolution {channels}"] = flops, partial(F.conv2d, x, weight, padding=kernel // 2)
    a = torch.rand(2048, 2048).to(dtype)
    return {**calls, "matrix_product": (2.0 * 2048**3, lambda: a @ a)}


def share(engine: Engine, photo: Photo) -> dict[str, float]:
    """GFLOP/s of g_a and g_s, of the best bare convolution and of a bare matrix product."""
    codec, macs = engine.default.codec, cost(CONFIGS[engine.default.entry.size])

    def measured() -> dict[str, float]:
        rate = torch.tensor([3])
        x = pad_to_stride(as_tensor(photo)).contiguous(memory_format=torch.channels_last)
        y_hat = codec.g_a(x, rate).round()
        calls: dict[str, tuple[float, Callable[[], object]]] = {
            "g_a": (2e3 * macs.encoder * PIXELS, lambda: codec.g_a(x, rate)),
            "g_s": (2e3 * macs.decoder * PIXELS, lambda: codec.g_s(y_hat, rate)),
            **bare(getattr(torch, engine.precision)),
        }
        found: dict[str, float] = {}
        for name, took in by_turns({name: call for name, (_, call) in calls.items()}).items():
            kind = name.split()[0]
            found[kind] = max(found.get(kind, 0), calls[name][0] / took / 1e9)
        return found

    return engine.on_device(measured)


def exact(engine: Engine, photo: Photo) -> dict[str, float]:
    """The part of a call's time that is not the float transforms: exact path, symbols, rANS."""
    codec, job, rate = engine.default.codec, [EncodeJob(photo, 4)], torch.tensor([3])
    (stream,), times = engine.encode(job), StageTimes()
    x = engine.on_device(lambda: pad_to_stride(as_tensor(photo)))
    y, *_ = engine.on_device(lambda: codec.analyse(x, rate))
    took = by_turns(
        {
            "analyse": lambda: engine.on_device(lambda: codec.analyse(x, rate)),
            "encode": lambda: engine.encode(job, times),
            "synthesise": lambda: engine.on_device(lambda: codec.synthesise(y, rate)),
            "decode": lambda: engine.decode([stream]),
        }
    )
    return {
        "compress": 1 - took["analyse"] / took["encode"],
        "decompress": 1 - took["synthesise"] / took["decode"],
        "rans_compress": times.entropy / (times.entropy + times.transform),
    }


LARGE = """
import json, sys, time
from service.engine import EncodeJob, Engine
from service.imaging import read_photo
from service.settings import Settings
from service.store import ModelStore
engine = Engine(ModelStore(Settings().store))
engine.warm_up()
def top():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
idle = top()
photo = read_photo(sys.stdin.buffer.read(), 10**8)
model, effort = sys.argv[1], int(sys.argv[2])
started = time.perf_counter()
streams = engine.encode([EncodeJob(photo, 4, model or None, effort)])
middle, encoded = time.perf_counter(), top()
engine.decode(streams)
print(json.dumps({"idle_mib": idle, "compress_s": middle - started, "compress_mib": encoded,
                  "decompress_s": time.perf_counter() - middle, "peak_mib": top(),
                  "bytes": len(streams[0].to_bytes())}))
"""


def large(height: int, width: int, model: str = "", effort: int = 0) -> dict[str, float]:
    """Seconds and peak resident memory, in MiB, of one photo of that size in a process of its own, at rate point 4."""
    _, photo = upload(height, width)
    command = [sys.executable, "-c", LARGE, model, str(effort)]
    done = subprocess.run(command, input=photo, check=True, capture_output=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"megapixels": height * width / 1e6, **found}


def startup() -> dict[str, float]:
    """Seconds from the start of the process to ready, and those of importing what others wrote."""
    started = time.perf_counter()
    with served():
        ready = time.perf_counter() - started
    others = "import torch, fastapi, uvicorn, numpy, PIL.Image, pydantic_settings, prometheus_client"
    imports = seconds(
        lambda: subprocess.run([sys.executable, "-W", "ignore", "-c", others], check=True, capture_output=True), 3, 0
    )
    return {"ready_s": ready, "imports_s": imports, "ours_s": ready - imports}


def table(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was wanted and what was measured."""
    rows: list[tuple[str, str, str]] = []
    timed = report["peers"]
    for name, goal in (("mbt2018-mean", 8), ("cheng2020-attn", 40), ("paper-s", 10)):
        for way in ("compress", "decompress"):
            ratio = timed[name][way] / timed["edge"][way]
            rows.append((f"{way}, against {name}", f">= {goal}x", f"{ratio:.1f}x ({timed[name][way]:.3f} s)"))
    found = report["share"]
    for part in ("g_a", "g_s"):
        ratio = found[part] / found["convolution"]
        rows.append((f"{part}, of a bare convolution", ">= 50%", f"{ratio:.0%} ({found[part]:.0f} GFLOP/s)"))
    rows += [
        (f"exact path and rANS, {way}", "< 20%", f"{report['exact'][way]:.0%}") for way in ("compress", "decompress")
    ]
    for megapixels, most in (("12", "< 2,000 MB"), ("50", "completes")):
        one = report["memory"][megapixels]
        spent = f"{1.048576 * one['peak_mib']:,.0f} MB, {one['compress_s']:.1f} + {one['decompress_s']:.1f} s"
        rows.append((f"{megapixels} megapixels, peak memory", most, spent))
    start = report["startup"]["all"]
    rows.append(("start to ready", "< 12 s", f"{start['ready_s']:.1f} s"))
    rows.append(("of it ours", "< 3 s", f"{start['ours_s']:.1f} s"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.speed", description=__doc__)
    parser.add_argument("--json", type=Path, default=result_file("speed"))
    args = parser.parse_args()
    engine = Engine(ModelStore(Settings().store), "cpu")
    engine.warm_up()
    photo, _ = upload()
    report: dict[str, Any] = {"machine": machine(), "precision": engine.precision, "startup": {"all": startup()}}
    report["memory"] = {"12": large(3000, 4000), "50": large(6000, 8333)}
    report |= {"share": share(engine, photo), "exact": exact(engine, photo), "peers": peers(engine, photo)}
    for row in table(report):
        print("{:38} {:>12}   {}".format(*row))
    args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
