"""The codec in this process, with the calls of `service.client.Client`: bytes in, bytes out, no server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from service.budget import RateSearch, budget_bytes
from service.calls import Compressed, Restored
from service.codec.bitstream import Bitstream
from service.codec.shipped import Watch
from service.engine import EncodeJob, Engine, StageTimes
from service.imaging import OutputFormat, check_size, read_photo, write_photo
from service.settings import Settings
from service.store import ModelStore


class GivenUp(RuntimeError):
    """`Local.give_up` ended the work."""


class Local(Watch):
    """The models of `settings.store` on this machine's device, each loaded when it is first used.

    Raises:
        StoreError: the store cannot be used; of its calls too, where a model is altered.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._engine = Engine(
            ModelStore(settings.store), settings.device, settings.precision, settings.threads, lazy=True
        )
        self._tell: Callable[[int, int], None] = lambda done, total: None
        self._done = self._total = 0
        self._given_up = False

    def watch(self, tell: Callable[[int, int], None]) -> None:
        """Have `tell(done, total)` called as the work proceeds, in steps of the transforms; a budget adds to total."""
        self._tell = tell

    def more(self, steps: int) -> None:
        """Of `Watch`: work that was not foreseen."""
        self._total += steps

    def step(self) -> None:
        """Of `Watch`.

        Raises:
            GivenUp: after `give_up`.
        """
        if self._given_up:
            raise GivenUp
        self._done += 1
        self._tell(self._done, self._total)

    def give_up(self) -> None:
        """Have all work, in whichever thread, end at its next step."""
        self._given_up = True

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
        effort: int | None = None,
    ) -> Compressed:
        """See `Client.compress`.

        Raises:
            ImageError: the bytes are no photo, or one that is too large.
            UnmeetableBudget: no rate point fits.
            UnknownModel: the store has none of that name.
            ValueError: the effort is beyond 8.
        """
        pixels = read_photo(photo, self._settings.max_pixels)
        count, times = pixels.shape[0] * pixels.shape[1], StageTimes()
        search = RateSearch[Bitstream](rate, budget_bytes(max_bytes, target_bpp, count))
        while wanted := search.wanted:
            self.more(self._engine.model(model).codec.steps)
            (stream,) = self._engine.encode([EncodeJob(pixels, wanted, model, effort or 0)], times, self)
            search.add(wanted, stream, len(stream.to_bytes()))
        stream = search.best()
        data = stream.to_bytes()
        return Compressed(data, bpp=8 * len(data) / count, **self._common(stream, times))

    def decompress(self, bitstream: bytes, *, media_type: str = "image/png", quality: int | None = None) -> Restored:
        """See `Client.decompress`.

        Raises:
            BitstreamError: the bytes are no bitstream, a damaged one, or one of a model that the store lacks.
            TooManyPixels: it is larger than the settings allow.
            ValueError: no format has that media type.
        """
        output = next((one for one in OutputFormat if one.media_type == media_type), None)
        if output is None:
            told = ", ".join(one.media_type for one in OutputFormat)
            raise ValueError(f"expected one of {told}, got {media_type}")
        stream, times = Bitstream.from_bytes(bitstream), StageTimes()
        check_size(stream.height, stream.width, self._settings.max_pixels)
        self.more(self._engine.model_of(stream).codec.steps)
        (photo,) = self._engine.decode([stream], times, self)
        return Restored(write_photo(photo, output, quality), media_type, **self._common(stream, times))

    def _common(self, stream: Bitstream, times: StageTimes) -> dict[str, Any]:
        return {
            "rate": stream.rate,
            "model": self._engine.model_of(stream).entry.name,
            "degradations": {found.kind.label: found.strength for found in stream.degradations},
            "timing": {"transform": 1000 * times.transform, "entropy": 1000 * times.entropy},
            "request_id": "",
        }
