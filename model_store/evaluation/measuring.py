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
from model_store.evaluation.rate_distortion import Record
from model_store.images import psnr

STRENGTHS = (5, 8, 11, 14, 18, 23, 28, 34, 42, 52)
"""What the cascade's denoiser is tuned over, on every eighth photo of a set, for each condition."""


Work = Callable[[Path, int, str], list[Record]]
"""Takes the path of a clean photo, its index in its sorted set, and the set's name."""


def of_each_photo(root: Path, name: str, work: Work, jobs: int, limit: int | None = None) -> list[Record]:
    """What `work` finds of the photos of a set, or of the first ones, in so many processes of a thread each.

    Raises:
        ValueError: the set is not below root.
    """
    paths = clean_paths(root, name)[:limit]
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        found = pool.map(work, paths, range(len(paths)), [name] * len(paths))
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


def best_strengths(root: Path, name: str, limit: int | None = None) -> dict[str, int]:
    """The denoiser's best strength under each Gaussian noise, on every eighth photo of a set."""
    scores: dict[str, dict[int, list[float]]] = {}
    for index, path in list(enumerate(clean_paths(root, name)[:limit]))[::8]:
        for sample in samples_of(path, index, name):
            if is_gaussian(sample.condition):
                of_condition = scores.setdefault(sample.condition.name, {h: [] for h in STRENGTHS})
                for h, values in of_condition.items():
                    values.append(psnr(denoised(sample.degraded, h), sample.clean))
    means = {name: {h: float(np.mean(values)) for h, values in each.items()} for name, each in scores.items()}
    for condition, each in means.items():
        print(condition, {h: round(score, 2) for h, score in each.items()})
    return {condition: max(each, key=lambda h: each[h]) for condition, each in means.items()}


def cascade_of(strengths: Mapping[str, int], path: Path, index: int, name: str) -> list[Record]:
    """A photo denoised at the strength of its condition, then WebP and AVIF."""
    records = []
    for sample in samples_of(path, index, name):
        if sample.condition.name in strengths:
            photo = denoised(sample.degraded, strengths[sample.condition.name])
            for format in ("WEBP", "AVIF"):
                records += [Record.of(name, sample, f"NLM+{format}", *point) for point in peer_points(format, photo)]
    return records


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
