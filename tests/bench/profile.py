"""`python -m tests.bench.profile [--height H --width W]`: milliseconds of every stage of one photo, each way.

Prints a Markdown table; `results/profile.md` keeps it beside those of earlier versions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from model_store.images import as_tensor
from service.codec.prior import parts
from service.codec.shipped import pad_to_stride
from service.engine import EncodeJob, Engine
from service.settings import Settings
from service.store import ModelStore
from tests.bench.load import upload
from tests.bench.speed import seconds

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.profile", description=__doc__)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    args = parser.parse_args()
    photo, _ = upload(args.height, args.width)
    repeats = 15 if args.height * args.width < 10**6 else 2

    def stage(name: str, work: Callable[[], T]) -> T:
        print(f"| {name} | {1000 * seconds(work, repeats, 2):.1f} |")
        return work()

    engine = Engine(ModelStore(Settings().store), "cpu")
    codec, rate = engine.default.codec, torch.tensor([3])
    print("| stage | ms |\n|---|---|")
    (stream,) = stage("**compress**", lambda: engine.encode([EncodeJob(photo, 4)]))
    stage("**decompress**", lambda: engine.decode([stream]))

    def torch_stages() -> None:
        g_a, g_s, prior = codec.g_a, codec.g_s, codec.prior
        x = stage("to float, padded", lambda: pad_to_stride(as_tensor(photo)))
        x = x.contiguous(memory_format=torch.channels_last)
        f = stage("g_a stem", lambda: g_a.stem(x - 0.5))
        f = stage("g_a blocks at 1/8", lambda: g_a.stacks[0](f, rate))
        f = stage("g_a down", lambda: g_a.downs[0](f))
        f = stage("g_a blocks at 1/16", lambda: g_a.stacks[1](f, rate))
        y = f.float() * g_a.gain(rate)
        z_hat = stage("h_a", lambda: codec.h_a(y / (g_a.gain(rate) * codec.deviation[:, None, None])).round())
        h, w = y.shape[-2:]
        features = stage("prior: features", lambda: prior.features(z_hat, rate, h, w))
        known = y.round().permute(0, 2, 3, 1).contiguous()
        for index, part in enumerate(parts(h, w, prior.passes, y.device)):
            stage(f"prior: pass {index}", partial(prior.predict, index, features, known, rate, part))
        symbols = stage("prior and symbols, encoder", lambda: codec.symbols_of(y, z_hat, rate))
        coded = stage("rANS encoder", lambda: codec.write(symbols[0]))
        y_hat = stage("prior and rANS decoder", lambda: codec.read([coded], rate, h, w))
        f = stage("g_s blocks at 1/16", lambda: g_s.stacks[0](y_hat * g_s.gain(rate), rate))
        f = stage("g_s up", lambda: g_s.ups[0](f))
        f = stage("g_s blocks at 1/8", lambda: g_s.stacks[1](f, rate))
        stage("g_s head", lambda: g_s.head(f))

    engine.on_device(torch_stages)


if __name__ == "__main__":
    main()
