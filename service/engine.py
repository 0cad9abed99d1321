"""The engine: lists of photos in, bitstreams out, and back. It owns the device, the precision and the loaded models.

Callers may hand over photos of any sizes and rates in one list; those that share a padded size run together. All of
torch runs in one thread of the engine: calls from several threads take turns there and overlap elsewhere, so that while
one runs a transform, another codes entropy. (With a second thread, OpenMP keeps a second team for the same cores, and
every parallel loop of both then pays for waking sleepers: a third more time for a photo.) Nothing here knows HTTP or
asyncio.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.codec.bitstream import Bitstream, BitstreamError, CorruptBitstream, Degradation
from service.codec.config import MOST_EFFORT, RATE_POINTS, STRIDE
from service.codec.device import pick_device, transform_precision
from service.codec.heap import keep_heap, release_heap
from service.codec.rans import CorruptPayload
from service.codec.shipped import (
    Coded,
    Effort,
    LatentSymbols,
    ShippedCodec,
    Watch,
    latent_size,
    pad_to_stride,
    padded_pixels,
)
from service.store import ModelEntry, ModelStore, StoreError

T = TypeVar("T")

Photo = NDArray[np.uint8]
"""An sRGB photo, (H, W, 3)."""

_Key = tuple[int, tuple[int, int], int]
"""What goes through a model together: its id, the latent size and the effort."""

CPU_PIXELS = 2**19
"""Pixels that go through the transforms together on the CPU: larger batches fall out of its caches and gain nothing."""

LARGE_PIXELS = 2**23
"""Photos beyond this leave the CPU's heap so large that it is given back."""


class DeviceFailure(RuntimeError):
    """The device failed in a way from which this process cannot recover."""


class UnknownModel(BitstreamError):
    """The stream needs, or the request names, a model that this store does not hold."""


@dataclass
class StageTimes:
    """Seconds spent per stage of one call; `queue` is the wait for the device while another call has it."""

    queue: float = 0.0
    transform: float = 0.0
    entropy: float = 0.0

    def measure(self, stage: str) -> AbstractContextManager[None]:
        return _Timer(self, stage)


@dataclass
class _Timer(AbstractContextManager[None]):
    times: StageTimes
    stage: str
    start: float = 0.0

    def __enter__(self) -> None:
        self.start = time.perf_counter() - self.times.queue

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.times.queue - self.start
        setattr(self.times, self.stage, getattr(self.times, self.stage) + seconds)


@dataclass(frozen=True)
class EncodeJob:
    """One photo to compress: (H, W, 3) uint8, the rate point 1 to 8, the model's name (None: the default), and the
    rounds of refinement, 0 to 8."""

    photo: Photo
    rate: int
    model: str | None = None
    effort: int = 0


@dataclass(frozen=True)
class Model:
    """A model with its entry in the store; its codec is loaded when it is first asked for."""

    entry: ModelEntry
    load: Callable[[], ShippedCodec]

    @cached_property
    def codec(self) -> ShippedCodec:
        """Raises:
        StoreError: it is altered or fails its known-answer test.
        """
        return self.load()

    def told_anew(self, entry: ModelEntry) -> Model:
        """The same model with the entry of a later index; its codec is loaded now."""
        if entry == self.entry:
            return self
        codec = self.codec
        model = Model(entry, lambda: codec)  # which holds nothing of what was told before
        _ = model.codec  # while one is computed, Python 3.11 lets nobody have another
        return model

    @property
    def resident_bytes(self) -> int:
        """Bytes of the transforms and the exact prior on the device."""
        codec = self.codec
        parts = (codec.g_a, codec.g_s, codec.h_a, codec.recomputed)
        tensors: list[Tensor] = [one for part in parts for one in (*part.parameters(), *part.buffers())]
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for storage in held.values()) + sum(one.nbytes for one in codec.prior.tensors())


def _let_go(error: BaseException | None) -> None:
    """Of the tensors of work that was ended, which the frames of an error's traceback hold."""
    if error:
        traceback.clear_frames(error.__traceback__)


class Engine:
    """Models of one store on one device.

    Args:
        store: an opened store.
        device, precision, threads: as in `Settings`.
        lazy: load each model when it is first used, and not all of them now.

    Raises:
        StoreError: a model is altered or fails its known-answer test.
    """

    def __init__(
        self, store: ModelStore, device: str = "auto", precision: str = "auto", threads: int = 0, lazy: bool = False
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = pick_device(device)
        self.precision = transform_precision(self.device) if precision == "auto" else precision
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        if self.device.type == "cpu":
            keep_heap()
        self.models = {entry.name: self._model(store, entry, lazy) for entry in store.index.models}
        self.default = self.models[store.index.default]
        self._by_id = {model.entry.model_id: model for model in self.models.values()}
        self._refreshing = threading.Lock()

    def close(self) -> None:
        """End the engine's thread once its work is done."""
        self._device_thread.shutdown()

    def on_device(self, work: Callable[[], T], times: StageTimes | None = None) -> T:
        """Run torch work in the engine's thread and wait for it; `times` learns how long it waited for its turn.

        No other thread may: where there are more OpenMP threads than CPUs, those that wait no longer spin, and
        everything takes a third longer (two cores, libgomp).
        """
        asked = time.perf_counter()

        def run() -> T:
            if times:
                times.queue += time.perf_counter() - asked
            return work()

        return self._device_thread.submit(torch.inference_mode()(run)).result()

    def _model(self, store: ModelStore, entry: ModelEntry, lazy: bool = False) -> Model:
        def load() -> ShippedCodec:
            return self.on_device(lambda: store.load(entry, self.device, getattr(torch, self.precision)))

        model = Model(entry, load)
        if not lazy:
            _ = model.codec
        return model

    def model(self, name: str | None) -> Model:
        """A model by name, None for the default.

        Raises:
            UnknownModel: the store has none of that name.
        """
        if name is None:
            return self.default
        if name not in self.models:
            raise UnknownModel(f"expected one of the models {', '.join(sorted(self.models))}, got {name!r}")
        return self.models[name]

    def model_of(self, stream: Bitstream) -> Model:
        """The model that wrote a stream.

        Raises:
            UnknownModel: the store does not hold it.
        """
        model = self._by_id.get(stream.model_id)
        if model is None:
            held = ", ".join(f"{m.entry.model_id.hex()} ({m.entry.name})" for m in self.models.values())
            raise UnknownModel(f"the stream needs model {stream.model_id.hex()}; this store holds {held}")
        return model

    def refresh(self, folder: Path) -> list[str]:
        """Take up a changed store while requests go on: load and warm up what is new, then switch to its default.

        Models that left the store stay loaded until the process ends, so that no request under way loses its model.

        Returns:
            The names of the models that are new.

        Raises:
            StoreError: the store cannot be used, or holds other weights under a known name; nothing has changed then.
        """
        with self._refreshing:
            store = ModelStore(folder)  # as it is now: whoever asked later read it later
            for entry in store.index.models:
                known = self.models.get(entry.name)
                if known and known.entry.sha256 != entry.sha256:
                    raise StoreError(f"model {entry.name}: expected the weights {known.entry.sha256}, its entry now "
                                     f"says {entry.sha256}; new weights need a new name")  # fmt: skip
            told = {entry.name: entry for entry in store.index.models}
            models = {name: model.told_anew(told.get(name, model.entry)) for name, model in self.models.items()}
            added = [name for name in told if name not in models]
            models |= {name: self._model(store, told[name]) for name in added}
            before = self.models, self._by_id
            self._by_id = {model.entry.model_id: model for model in models.values()}
            self.models = models
            try:
                self.warm_up(added)
            except BaseException:
                self.models, self._by_id = before
                raise
            self.default = models[store.index.default]
            return added

    def warm_up(self, names: Sequence[str] | None = None) -> None:
        """Run every variant of some models, or of all, once each way, so that the first request pays for nothing."""
        photo = np.zeros((32, 32, 3), np.uint8)
        for name in self.models if names is None else names:
            self.decode(self.encode([EncodeJob(photo, rate, name) for rate in range(1, RATE_POINTS + 1)]))
        if self.device.type == "cpu":
            release_heap()  # of what loading left: 55 MB with ten models

    def encode(
        self, jobs: Sequence[EncodeJob], times: StageTimes | None = None, watch: Watch | None = None
    ) -> list[Bitstream]:
        """Compress photos of any sizes and rates; results in the order of the jobs. `watch` follows it, and may end it.

        Raises:
            UnknownModel: a job names a model that the store does not hold.
            ValueError: a photo, a rate point or an effort is out of range.
        """
        for job in jobs:
            if job.photo.dtype != np.uint8 or job.photo.ndim != 3 or job.photo.shape[2] != 3 or 0 in job.photo.shape:
                raise ValueError(f"expected a photo (H, W, 3) of uint8, got {job.photo.shape} of {job.photo.dtype}")
            if not 1 <= job.rate <= RATE_POINTS:
                raise ValueError(f"expected a rate point from 1 to {RATE_POINTS}, got {job.rate}")
            if not 0 <= job.effort <= MOST_EFFORT:
                raise ValueError(f"expected an effort from 0 to {MOST_EFFORT}, got {job.effort}")
        models = [self.model(job.model) for job in jobs]

        def group(indexes: list[int]) -> list[Bitstream]:
            chosen = [jobs[index] for index in indexes]
            return self._encode_group(models[indexes[0]], chosen, times or StageTimes(), watch or Watch())

        sizes = [latent_size(*job.photo.shape[:2]) for job in jobs]
        return self._grouped([(id(model), size, job.effort) for model, size, job in zip(models, sizes, jobs)], group)

    def decode(
        self, streams: Sequence[Bitstream], times: StageTimes | None = None, watch: Watch | None = None
    ) -> list[Photo]:
        """Restore photos from streams of any sizes, rates and models; results in order. `watch` as in `encode`.

        Raises:
            UnknownModel: a stream's model is not in the store.
            CorruptBitstream: a stream passes its checksum but contradicts itself.
        """
        models = [self.model_of(stream) for stream in streams]

        def group(indexes: list[int]) -> list[Photo]:
            chosen = [streams[index] for index in indexes]
            return self._decode_group(models[indexes[0]], chosen, times or StageTimes(), watch or Watch())

        sizes = [latent_size(stream.height, stream.width) for stream in streams]
        return self._grouped([(id(model), size, 0) for model, size in zip(models, sizes)], group)

    def _grouped(self, keys: Sequence[_Key], run: Callable[[list[int]], list[T]]) -> list[T]:
        """Run indexes that share a key together; results in order."""
        groups: dict[_Key, list[int]] = defaultdict(list)
        for index, key in enumerate(keys):
            groups[key].append(index)
        results: dict[int, T] = {}
        for (_, (rows, columns), _), indexes in groups.items():
            try:
                results.update(zip(indexes, run(indexes)))
            except torch.AcceleratorError as error:
                _let_go(error)
                if "out of memory" in str(error):  # beside torch's own allocator; the device still works
                    raise MemoryError(str(error)) from error
                raise DeviceFailure(f"{self.device}: {error}") from error
            except RuntimeError as error:
                _let_go(error)
                if "can't allocate memory" in str(error):  # how torch words it on the CPU
                    raise MemoryError(str(error)) from error
                raise
            finally:
                _let_go(sys.exception())
                self._tidy(rows * columns * STRIDE**2)
        return [results[index] for index in range(len(keys))]

    def _tidy(self, pixels: int) -> None:
        """Called after a photo of so many pixels."""
        if self.device.type == "cpu" and pixels > LARGE_PIXELS:
            release_heap()

    def _parts(self, count: int, pixels: int) -> list[slice]:
        """How a batch goes through the transforms: whole on a GPU, in parts of about `CPU_PIXELS` on the CPU."""
        size = count if self.device.type != "cpu" else max(1, CPU_PIXELS // pixels)
        return [slice(start, start + size) for start in range(0, count, size)]

    def _encode_group(self, model: Model, jobs: list[EncodeJob], times: StageTimes, watch: Watch) -> list[Bitstream]:
        codec, streams = model.codec, []

        def transform(part: Sequence[EncodeJob]) -> tuple[list[LatentSymbols], list[tuple[Degradation, ...]]]:
            with times.measure("transform"), codec.watched_by(watch):
                rate = torch.tensor([job.rate - 1 for job in part], device=self.device)
                padded = [self._padded(job.photo) for job in part]
                x = torch.cat(padded) if len(padded) > 1 else padded[0]
                y, z_hat, found = codec.analyse(x, rate)
                effort = Effort(jobs[0].effort, x, found) if jobs[0].effort else None
                del padded, x  # a large photo has no memory to spare
                return codec.symbols_of(y, z_hat, rate, effort), found

        for part in self._parts(len(jobs), padded_pixels(*jobs[0].photo.shape[:2])):
            latents, found = self.on_device(partial(transform, jobs[part]), times)
            with times.measure("entropy"):
                coded = [codec.write(one) for one in latents]
            model_id = model.entry.model_id
            for job, degradations, one in zip(jobs[part], found, coded):
                height, width = job.photo.shape[:2]
                streams.append(Bitstream(model_id, job.rate, width, height, degradations, one.outliers, one.payload))
        return streams

    def _padded(self, photo: Photo) -> Tensor:
        """(1, 3, H, W) in [0, 1] on the device, padded."""
        x = torch.from_numpy(np.array(photo)).to(self.device).permute(2, 0, 1)[None].float().div_(255)
        return pad_to_stride(x)

    def _decode_group(self, model: Model, streams: list[Bitstream], times: StageTimes, watch: Watch) -> list[Photo]:
        codec, photos = model.codec, []
        h, w = latent_size(streams[0].height, streams[0].width)

        def transform(y_hat: Tensor, rate: Tensor) -> NDArray[np.uint8]:
            with times.measure("transform"), codec.watched_by(watch):
                x_hat = codec.synthesise(y_hat, rate)
                pixels: NDArray[np.uint8] = x_hat.mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
                return pixels

        for part in self._parts(len(streams), padded_pixels(streams[0].height, streams[0].width)):
            rate = torch.tensor([stream.rate - 1 for stream in streams[part]], device=self.device)
            coded = [Coded(stream.payload, stream.outliers) for stream in streams[part]]
            with times.measure("entropy"):
                try:
                    y_hat = codec.read(coded, rate, h, w, partial(self.on_device, times=times))
                except CorruptPayload as error:
                    raise CorruptBitstream(str(error)) from error
            pixels = self.on_device(partial(transform, y_hat, rate), times)
            photos += [np.ascontiguousarray(photo[: s.height, : s.width]) for photo, s in zip(pixels, streams[part])]
        return photos
