"""The codec in this process, with the calls of `service.client.Client`: bytes in, bytes out, no server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from service.budget import DEFAULT_RATE, best_rate, budget_bytes, next_rate
from service.client import Compressed, Restored
from service.codec.bitstream import Bitstream
from service.engine import EncodeJob, Engine, Model, StageTimes
from service.imaging import OutputFormat, check_size, read_photo, write_photo
from service.settings import Settings
from service.store import ModelStore


class Local:
    """The models of `settings.store` on this machine's device.

    Raises:
        StoreError: the store cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._engine = Engine(ModelStore(settings.store), settings.device, settings.precision, settings.threads)
        self._tell: Callable[[int, int], None] = lambda done, total: None
        self._done = self._total = 0

    def watch(self, tell: Callable[[int, int], None]) -> None:
        """Have `tell(done, total)` called as the work proceeds, in steps of the transforms; a budget adds to total."""
        self._tell = tell

    def _expect(self, model: Model, photos: int) -> None:
        self._total += photos * model.codec.watch(self._step, self._add)

    def _add(self, steps: int) -> None:
        self._total += steps

    def _step(self) -> None:
        self._done += 1
        self._tell(self._done, self._total)

    def close(self) -> None:
        self._engine.close()

    def compress(
        self,
        photo: bytes,
        *,
        rate: int | None = None,
        max_bytes: int | None = None,
        target_bpp: float | None = None,
        model: str | None = None,
    ) -> Compressed:
        """See `Client.compress`.

        Raises:
            ImageError: the bytes are no photo, or one that is too large.
            UnmeetableBudget: no rate point fits.
            UnknownModel: the store has none of that name.
        """
        pixels = read_photo(photo, self._settings.max_pixels)
        count, times = pixels.shape[0] * pixels.shape[1], StageTimes()
        budget = budget_bytes(max_bytes, target_bpp, count)
        tried: dict[int, Bitstream] = {}
        sizes: dict[int, int] = {}
        wanted = rate or DEFAULT_RATE if budget is None else next_rate(sizes, budget)
        while wanted:
            self._expect(self._engine.model(model), 1)
            (tried[wanted],) = self._engine.encode([EncodeJob(pixels, wanted, model)], times)
            sizes[wanted] = len(tried[wanted].to_bytes())
            wanted = None if budget is None else next_rate(sizes, budget)
        chosen = next(iter(tried)) if budget is None else best_rate(sizes, budget)
        data = tried[chosen].to_bytes()
        return Compressed(data, bpp=8 * len(data) / count, **self._common(tried[chosen], times))

    def decompress(self, bitstream: bytes, *, media_type: str = "image/png", quality: int | None = None) -> Restored:
        """See `Client.decompress`.

        Raises:
            BitstreamError: the bytes are no bitstream, a damaged one, or one of a model that the store lacks.
            TooManyPixels: it is larger than the settings allow.
        """
        stream, times = Bitstream.from_bytes(bitstream), StageTimes()
        check_size(stream.height, stream.width, self._settings.max_pixels)
        self._expect(self._engine.model_of(stream), 1)
        (photo,) = self._engine.decode([stream], times)
        output = next(one for one in OutputFormat if one.media_type == media_type)
        return Restored(write_photo(photo, output, quality), media_type, **self._common(stream, times))

    def _common(self, stream: Bitstream, times: StageTimes) -> dict[str, Any]:
        return {
            "rate": stream.rate,
            "model": self._engine.model_of(stream).entry.name,
            "degradations": {found.kind.label: found.strength for found in stream.degradations},
            "timing": {"transform": 1000 * times.transform, "entropy": 1000 * times.entropy},
            "request_id": "",
        }
