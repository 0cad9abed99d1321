"""`python -m tests.bench.gpu`: what `base` reaches on a GPU with its latest weights, 16 photos of 768x512 at a time.

    end to end  photos a second through `Engine.encode` and `decode`, from two threads as the service calls it
    transforms  g_a and g_s: arithmetic against a bare matrix product of this card, and the memory traffic of their
                operations, each reading its inputs and writing its result once, against a bare copy
    idle        the part of the time under that load in which nothing runs on the card
    stages      seconds of a photo in the transforms (with the exact path) and in entropy coding, a batch at a time

Prints a table with the goals and writes JSON. `--device cpu --batch 2 --seconds 2` rehearses it. A benchmark, not a
test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_store.images import as_tensor
from model_store.training.export import STATES, enter
from model_store.training.weights import weights_to_start_from
from service.codec.bitstream import Bitstream
from service.codec.config import CONFIGS
from service.codec.cost import cost
from service.codec.device import pick_device
from service.codec.model import TrainableCodec, ship
from service.engine import EncodeJob, Engine, StageTimes
from service.store import ModelStore
from tests.bench.load import upload
from tests.bench.machine import machine
from tests.bench.speed import by_turns

SIZE, RATE = "base", 4
RESULT = Path(__file__).parent / "results" / "gpu.json"

Figures = dict[str, float]


def engine_of(size: str, device: str) -> Engine:
    """An engine whose only model is made of the weights that training of `size` goes on from."""
    model = TrainableCodec(CONFIGS[size])
    model.load_state_dict(weights_to_start_from(STATES / f"{size}.safetensors", model.config))
    with tempfile.TemporaryDirectory() as folder:
        enter(Path(folder), size, size, *ship(model), {}, True)
        return Engine(ModelStore(Path(folder)), device)


class Traffic(TorchDispatchMode):
    """Counts the bytes of the inputs and results of every operation that computes something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            seen = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
            self.bytes += sum(one.numel() * one.element_size() for one in seen)
        return result


def awaited(device: torch.device, call: Callable[[], object]) -> Callable[[], object]:
    """The call, and what it leaves under way on a GPU."""

    def work() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return work


def limits(engine: Engine, side: int) -> Figures:
    """FLOP/s of a bare matrix product in the engine's precision, and bytes/s that a bare copy reads and writes."""
    a = torch.rand(side, side, device=engine.device).to(getattr(torch, engine.precision))
    x = torch.rand(2**26, device=engine.device)
    y = torch.empty_like(x)
    calls: dict[str, Callable[[], object]] = {"product": lambda: a @ a, "copy": lambda: y.copy_(x)}
    took = by_turns({name: awaited(engine.device, call) for name, call in calls.items()})
    moved = 2.0 * x.numel() * x.element_size()
    return {"matrix_flops": 2.0 * side**3 / took["product"], "copy_bytes": moved / took["copy"]}


def transforms(engine: Engine, batch: int, side: int) -> dict[str, Figures]:
    """Seconds of g_a and g_s on a batch, and the least that the card's arithmetic and its memory would allow."""
    codec, macs = engine.default.codec, cost(CONFIGS[SIZE])
    photo, _ = upload()
    rate = torch.full((batch,), RATE - 1, device=engine.device)
    x = as_tensor(photo).to(engine.device).expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    y_hat = codec.g_a(x, rate).round()
    bare, pixels, found = limits(engine, side), batch * photo.shape[0] * photo.shape[1], {}
    each = (("g_a", codec.g_a, x, macs.encoder), ("g_s", codec.g_s, y_hat, macs.decoder))
    took = by_turns({name: awaited(engine.device, partial(part, seen, rate)) for name, part, seen, _ in each})
    for name, part, seen, kmacs in each:
        with Traffic() as traffic:
            part(seen, rate)
        found[name] = {
            "seconds": took[name],
            "arithmetic_seconds": 2e3 * kmacs * pixels / bare["matrix_flops"],
            "memory_seconds": traffic.bytes / bare["copy_bytes"],
        }
    return {"bare": bare, **found}


def under_load(call: Callable[[], object], batch: int, seconds: float) -> float:
    """Photos a second where two threads call in turn."""
    call()
    ends, done = time.perf_counter() + seconds, 0

    def work() -> None:
        nonlocal done
        while time.perf_counter() < ends:
            call()
            done += batch

    started, threads = time.perf_counter(), [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done / (time.perf_counter() - started)


def idle(call: Callable[[], object], batch: int, seconds: float) -> float:
    """The part of the time between the first and the last kernel in which none ran."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        under_load(call, batch, seconds)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in seen.events() or []
        if event.device_type.name == "CUDA"
    )
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy, reached = busy + max(0.0, end - max(start, reached)), max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def end_to_end(engine: Engine, batch: int, seconds: float) -> dict[str, Figures]:
    """Photos a second each way, the stages of one batch alone, and idle time where there is a GPU."""
    jobs = [EncodeJob(upload(seed=seed)[0], RATE) for seed in range(batch)]
    streams: list[Bitstream] = engine.encode(jobs)
    found = {}
    calls: dict[str, Callable[..., object]] = {
        "compress": partial(engine.encode, jobs),
        "decompress": partial(engine.decode, streams),
    }
    for way, call in calls.items():
        times, photos = StageTimes(), under_load(call, batch, seconds)
        call(times)
        found[way] = {
            "photos_per_second": photos,
            "transform_seconds": times.transform / batch,
            "entropy_seconds": times.entropy / batch,
        }
        if engine.device.type == "cuda":
            found[way]["idle"] = idle(call, batch, min(seconds, 3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement under load")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    device = pick_device(args.device)
    if device.type == "cpu" and args.device == "auto":
        print("no GPU here; --device cpu rehearses this benchmark")
        return
    engine = engine_of(SIZE, args.device)
    side = 2048 if device.type == "cpu" else 8192
    parts = engine.on_device(lambda: transforms(engine, args.batch, side))
    ways = end_to_end(engine, args.batch, args.seconds)
    for way, found in ways.items():
        told = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if name != "photos_per_second")
        print(f"{way:12} >= 500 photos/s   {found['photos_per_second']:.1f} photos/s ({told})")
    for name in ("g_a", "g_s"):
        found = parts[name]
        arithmetic, memory = (found[f"{kind}_seconds"] / found["seconds"] for kind in ("arithmetic", "memory"))
        print(f"{name:12} >= 40% of either  {arithmetic:.0%} of the matrix peak, {memory:.0%} of the memory bound")
    content = {"machine": machine(), "device": str(engine.device), "precision": engine.precision,
               "batch": args.batch, "transforms": parts, "end_to_end": ways}  # fmt: skip
    args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
