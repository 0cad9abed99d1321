"""`service.engine`: lists in, lists out, at the sizes they had; and better pictures than came in."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from model_store.images import psnr
from service.codec import rans
from service.codec.bitstream import Bitstream, DegradationKind
from service.codec.shipped import Watch
from service.engine import DeviceFailure, EncodeJob, Engine, Photo, UnknownModel
from service.errors import OUT_OF_MEMORY, problem_of
from tests.conftest import noisy


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (15, 17), (16, 16), (33, 1), (64, 100)])
def test_any_size_comes_back_at_exactly_that_size(engine: Engine, parrots: Photo, size: tuple[int, int]) -> None:
    photo = parrots[: size[0], : size[1]]
    (stream,) = engine.encode([EncodeJob(photo, 6)])
    (back,) = engine.decode([Bitstream.from_bytes(stream.to_bytes())])
    assert back.shape == photo.shape
    assert back.dtype == np.uint8
    assert psnr(back, photo) > 20


def test_mixed_sizes_and_rates_come_back_in_order(engine: Engine, parrots: Photo, bikes: Photo) -> None:
    jobs = [
        EncodeJob(parrots[:64, :64], 8),
        EncodeJob(bikes, 1),
        EncodeJob(parrots[60:124, :64], 2),
        EncodeJob(bikes, 8),
    ]
    streams = engine.encode(jobs)
    assert [stream.rate for stream in streams] == [8, 1, 2, 8]
    for job, back in zip(jobs, engine.decode(streams)):
        assert back.shape == job.photo.shape
        assert psnr(back, job.photo) > 18


def test_a_photo_is_decoded_alike_alone_and_among_others(engine: Engine, parrots: Photo) -> None:
    """Latents are identical; pixels may differ by an 8-bit level or two, since g_s is float."""
    photos = [np.roll(parrots, 31 * k, 1) for k in range(4)]
    streams = engine.encode([EncodeJob(photo, 2 * k + 1) for k, photo in enumerate(photos)])
    together = engine.decode(streams)
    for stream, back in zip(streams, together):
        (alone,) = engine.decode([stream])
        # bfloat16 rounds in other places for other batches: one level, rarely two at strong edges
        assert np.abs(alone.astype(int) - back.astype(int)).max() <= 2


def test_every_rate_point_spends_more_and_gains(engine: Engine, parrots: Photo) -> None:
    streams = engine.encode([EncodeJob(parrots, rate) for rate in range(1, 9)])
    sizes = [len(stream.to_bytes()) for stream in streams]
    quality = [psnr(back, parrots) for back in engine.decode(streams)]
    assert sizes == sorted(sizes)
    assert quality == sorted(quality)


@pytest.mark.parametrize("name", ["parrots", "bikes"])
def test_noise_goes_away(engine: Engine, name: str, request: pytest.FixtureRequest) -> None:
    clean: Photo = request.getfixturevalue(name)
    degraded = noisy(clean, 25)
    (stream,) = engine.encode([EncodeJob(degraded, 5)])
    (back,) = engine.decode([stream])
    assert psnr(back, clean) > psnr(degraded, clean) + 3


@pytest.mark.parametrize("size", [(48, 48), (72, 200), (256, 256)])
def test_plain_grey_is_no_fog(engine: Engine, size: tuple[int, int]) -> None:
    """Models that had learned from photographs alone brightened it by up to 138 levels."""
    greys = [0, 48, 96, 112, 128, 144, 160, 192, 255]
    jobs = [
        EncodeJob(np.full((*size, 3), grey, np.uint8), rate, model)
        for model in (None, "base-3")
        for grey in greys
        for rate in (1, 4, 8)
    ]
    streams = engine.encode(jobs)
    for job, stream, back in zip(jobs, streams, engine.decode(streams)):
        grey = int(job.photo[0, 0, 0])
        assert np.abs(back.mean((0, 1)) - grey).max() < 6, (job.model, grey, job.rate)
        assert np.abs(back.astype(int) - grey).max() < (24 if job.model is None else 56), (job.model, grey, job.rate)
        kinds = {found.kind for found in stream.degradations}
        assert DegradationKind.HAZE not in kinds, (job.model, grey, job.rate)
        assert grey < 96 or DegradationKind.LOW_LIGHT not in kinds, (job.model, grey, job.rate)


def test_wrong_jobs_are_named(engine: Engine, parrots: Photo) -> None:
    with pytest.raises(UnknownModel, match="'nope'"):
        engine.encode([EncodeJob(parrots, 4, "nope")])
    with pytest.raises(ValueError, match="rate point from 1 to 8, got 0"):
        engine.encode([EncodeJob(parrots, 0)])
    with pytest.raises(ValueError, match="of uint8"):
        engine.encode([EncodeJob(parrots.astype(np.float32), 4)])
    with pytest.raises(UnknownModel, match="0102030405060708"):
        engine.decode([Bitstream(bytes(range(1, 9)), 4, 16, 16, (), b"", b"")])
    assert engine.encode([]) == []


def test_whoever_watches_may_end_the_work(engine: Engine, bikes: Photo, monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(Watch):
        seen = 0

        def step(self) -> None:
            self.seen += 1
            if self.seen == 3:
                raise TimeoutError("enough")

    (stream,) = engine.encode([EncodeJob(bikes, 4)])
    for work in (
        lambda watch: engine.encode([EncodeJob(bikes, 4)], watch=watch),
        lambda watch: engine.decode([stream], watch=watch),
    ):
        watch = Impatient()
        with pytest.raises(TimeoutError, match="enough"):
            work(watch)
        assert watch.seen == 3
    assert engine.encode([EncodeJob(bikes, 4)]) == [stream]
    monkeypatch.setattr("service.engine.LARGE_PIXELS", 1)
    released: list[int] = []
    monkeypatch.setattr("service.engine.release_heap", lambda: released.append(1))
    with pytest.raises(TimeoutError):
        engine.encode([EncodeJob(bikes, 4)], watch=Impatient())
    assert engine.device.type != "cpu" or released
    gone = weakref.ref(watch)
    del watch
    assert gone() is None  # with whatever it held on to: the photo, its result


@pytest.mark.parametrize(
    ("said", "kind"),
    [("an illegal memory access was encountered", DeviceFailure), ("out of memory", MemoryError)],
)
def test_a_lost_device_is_told_from_a_full_one(
    engine: Engine, bikes: Photo, monkeypatch: pytest.MonkeyPatch, said: str, kind: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError(f"CUDA error: {said}")

    with monkeypatch.context() as patch:
        patch.setattr(engine.default.codec, "analyse", fail)
        with pytest.raises(kind, match=said):
            engine.encode([EncodeJob(bikes, 4)])


def test_entropy_is_coded_beside_the_device(engine: Engine, bikes: Photo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in its thread, where it would keep the transforms of others waiting."""
    threads = set()
    for kind, name in ((rans.Encoder, "finish"), (rans.Decoder, "take")):
        work = getattr(kind, name)

        def noted(*args: object, work: Callable[..., object] = work) -> object:
            threads.add(threading.current_thread().name)
            return work(*args)

        monkeypatch.setattr(kind, name, noted)
    engine.decode(engine.encode([EncodeJob(bikes, 4)]))
    assert threads
    assert not any(name.startswith("device") for name in threads)


def test_too_little_memory_is_told_apart_from_a_failure(
    engine: Engine, bikes: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.default.codec, "analyse", lambda *_: torch.empty(10**15))
        with pytest.raises(MemoryError) as raised:
            engine.encode([EncodeJob(bikes, 4)])
    assert problem_of(raised.value).kind is OUT_OF_MEMORY
    assert len(engine.encode([EncodeJob(bikes, 4)])) == 1


def test_start_up_and_refinement_come_without_the_compiler_of_torch() -> None:
    """Some ways to make a parameter or to ask for a gradient import it: two seconds and 140 MB."""
    script = """
import sys
import numpy as np
from service.engine import EncodeJob, Engine
from service.settings import DEFAULT_STORE
from service.store import ModelStore
engine = Engine(ModelStore(DEFAULT_STORE), lazy=True)
engine.decode(engine.encode([EncodeJob(np.full((32, 32, 3), 128, np.uint8), 4, effort=1)]))
assert not {"torch._dynamo", "sympy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
