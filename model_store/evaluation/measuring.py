"""What each codec makes of a photo under every condition, and of all photos of a set in several processes.

The processes find their work by its name: it has to live in a module that can be imported, which `__main__` is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model_store.evaluation.codecs import PEERS, LimpidCodec, denoised, peer_points
from model_store.evaluation.conditions import Condition, clean_paths, samples_of
from model_store.evaluation.rate_distortion import BUDGET, Record, curves

CASCADED = ("WEBP", "AVIF")
"""What comes after the cascade's denoiser."""

SHARES = (0.25, 0.3, 0.36, 0.42, 0.48, 0.56, 0.65, 0.75)
"""Of sigma: the strengths over which the denoiser is tuned, for each noise and each format."""

TUNED_EVERY = 8
"""On every so manieth photo of a set."""

Shares = Mapping[str, Mapping[str, float]]
"""The denoiser's strength over sigma by condition and format."""

Work = Callable[[Path, int, str], list[Record]]
"""Takes the path of a clean photo, its index in its sorted set, and the set's name."""


def of_each_photo(
    root: Path, name: str, work: Work, jobs: int, limit: int | None = None, every: int = 1
) -> list[Record]:
    """What `work` finds of the photos of a set, or of some of the first ones, in so many processes of a thread each.

    Raises:
        ValueError: the set is not below root.
    """
    indices, paths = zip(*list(enumerate(clean_paths(root, name)[:limit]))[::every])
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        found = pool.map(work, paths, indices, [name] * len(paths))
        return [record for records in tqdm(found, name, len(paths)) for record in records]


def peers_of(path: Path, index: int, name: str) -> list[Record]:
    """The upload itself, and every peer at every quality."""
    records = []
    for sample in samples_of(path, index, name):
        if sample.condition.name != "clean":
            records.append(Record.of(name, sample, "INPUT", 0, 0, sample.degraded))
        for format in PEERS:
            records += [Record.of(name, sample, format, *point) for point in peer_points(format, sample.degraded)]
    return records


def is_gaussian(condition: Condition) -> bool:
    """Whether it is what the cascade denoises."""
    return condition.name.startswith("noise-")


def tried_of(path: Path, index: int, name: str) -> list[Record]:
    """A photo denoised at every strength, then every format, codecs `FORMAT SHARE`."""
    return [
        Record.of(name, sample, f"{format} {share}", *point)
        for sample in samples_of(path, index, name)
        if is_gaussian(sample.condition)
        for share in SHARES
        for photo in [denoised(sample.degraded, share * _sigma(sample.condition))]
        for format in CASCADED
        for point in peer_points(format, photo)
    ]


def best_shares(tried: Sequence[Record]) -> Shares:
    """What `tried_of` shows to be best within `BUDGET`: a codec denoises too, so not what is best before it."""
    within: dict[str, dict[str, dict[float, float]]] = {}
    for (_, condition, codec), curve in curves(tried).items():
        format, share = codec.split()
        of_format = within.setdefault(condition, {}).setdefault(format, {})
        of_format[float(share)] = curve.psnr_within(BUDGET) or -np.inf
    return {
        condition: {format: max(values, key=values.__getitem__) for format, values in formats.items()}
        for condition, formats in within.items()
    }


def cascade_of(shares: Shares, path: Path, index: int, name: str) -> list[Record]:
    """A photo denoised at the strength of its condition and of the format that comes after it."""
    return [
        Record.of(name, sample, f"NLM+{format}", *point)
        for sample in samples_of(path, index, name)
        for format, share in shares.get(sample.condition.name, {}).items()
        for point in peer_points(format, denoised(sample.degraded, share * _sigma(sample.condition)))
    ]


def _sigma(condition: Condition) -> int:
    return int(condition.name.removeprefix("noise-"))


def refined_of(
    store: Path,
    model: str,
    efforts: Sequence[int],
    condition: str,
    rates: Sequence[int],
    path: Path,
    index: int,
    name: str,
) -> list[Record]:
    """A model of a store at some efforts, codecs `effort-N`, under a condition and at some of its rate points."""
    return [
        Record.of(name, sample, f"effort-{effort}", *point)
        for sample in samples_of(path, index, name)
        if sample.condition.name == condition
        for effort in efforts
        for point in _codec(store, model).points(sample, rates, effort)
    ]


_codec = cache(LimpidCodec)
"""Of this process."""


def model_of(store: Path, model: str, path: Path, index: int, name: str) -> list[Record]:
    """A model of a store at every rate point of each condition."""
    return [
        Record.of(name, sample, "LIMPID", *point)
        for sample in samples_of(path, index, name)
        for point in _codec(store, model).points(sample)
    ]
