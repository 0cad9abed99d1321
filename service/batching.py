"""The micro-batcher: what waits for the device, and what goes to it next. Pure asyncio; knows no torch and no HTTP.

It is work-conserving: while the device is busy, items gather in buckets of equal key; when it frees, the bucket with
the oldest head goes, first in first out, up to the caps. No timer forms a batch before the device is free, so batches
grow with the load by themselves. A batch that fails is halved and tried again until the bad item stands alone. The
queue is bounded in items, in bytes and in time: what would come too late, at the pace of late, behind what waits is
refused at once. What was cancelled, came too late or would not be done in time after all is dropped just before launch:
else an overloaded device would work on nothing but what is about to expire.
A batch for which nobody waits any more can tell so, and end early.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_LEAST_PIXELS = 2**16
"""What takes as long as anything smaller: by its pixels alone one of 16x16 would make 12 megapixels hopeless."""

_MARGIN = 1.25
"""An item is refused where so many times the seconds that it should take, with what is ahead of it, are not left."""


class QueueFull(RuntimeError):
    """As many items or bytes wait as the queue holds, or as the item has time for. `retry_after`: seconds until they
    have drained, or half of them where time is short: sooner all would come back for one place."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(TimeoutError):
    """The item's deadline passed before its turn came, or was too near for it."""


class DeviceBroken(RuntimeError):
    """The device will not recover in this process; raised by the runner, then told to every item."""


@dataclass(frozen=True)
class Limits:
    """Caps of a batcher.

    Attributes:
        batch_items, batch_pixels: of one batch; a single item may exceed the pixels.
        batch_wait: seconds that a batch that is not full waits on purpose for company; 0 turns that off.
        queue_items, queue_bytes: of all that wait.
        in_flight: batches that run at once; with 2 the entropy coding of one overlaps the device step of the other.
    """

    batch_items: int = 16
    batch_pixels: int = 16_000_000
    batch_wait: float = 0.0
    queue_items: int = 64
    queue_bytes: int = 2**30
    in_flight: int = 2


@dataclass(frozen=True)
class Events:
    """What a batcher tells about itself: a batch of a key launched with n items, a failed batch halved and why."""

    launched: Callable[[Hashable, int], None] = lambda key, items: None
    retried: Callable[[Exception], None] = lambda error: None


@dataclass(frozen=True)
class Done(Generic[Result]):
    """A result, and the seconds that the item waited before its batch was launched."""

    result: Result
    queued: float


@dataclass(eq=False)
class _Entry(Generic[Item, Result]):
    item: Item
    key: Hashable
    pixels: int
    bytes: int
    deadline: float
    arrived: float
    order: int
    future: asyncio.Future[Done[Result]] = field(repr=False)

    @property
    def work(self) -> int:
        """The pixels that it counts for in time."""
        return _work_of(self.pixels)


class Batcher(Generic[Item, Result]):
    """Forms batches and hands them to the runner.

    Args:
        runner: takes a key, items of that key, and a function that tells, in any thread, whether anybody still
            waits for one of them. Returns their results in order. Raises `DeviceBroken` when the device is gone,
            anything else when the batch failed or nobody waits.
        limits: the caps.
        clock: seconds, monotonic; deadlines are on this clock.
        events: callbacks for metrics.
        took: the pixels that an item counts for in time once its result is known; None where those it came with do.
    """

    def __init__(
        self,
        runner: Callable[[Hashable, Sequence[Item], Callable[[], bool]], Awaitable[Sequence[Result]]],
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        events: Events | None = None,
        took: Callable[[Item, Result], int | None] = lambda item, result: None,
    ) -> None:
        self._runner, self._limits, self._clock = runner, limits or Limits(), clock
        self._events, self._took = events or Events(), took
        self._buckets: dict[Hashable, deque[_Entry[Item, Result]]] = {}
        self._order = itertools.count()
        self._running: dict[asyncio.Task[None], list[_Entry[Item, Result]]] = {}
        self._pumping = False
        self._wake: asyncio.TimerHandle | None = None
        self._seconds = self._work = 0.0  # of batches that were finished, the late ones counting most
        self.waiting_items = 0
        self.waiting_bytes = 0
        self.broken: DeviceBroken | None = None

    async def submit(
        self,
        item: Item,
        key: Hashable,
        *,
        pixels: int = 0,
        bytes: int = 0,
        deadline: float = math.inf,
        begun: bool = False,
    ) -> Done[Result]:
        """Queue an item and wait for its result. Cancelling the caller takes the item back while it waits.

        `begun`: it goes on with work that the device has begun, which a full queue does not refuse.

        Raises:
            QueueFull, DeviceBroken: at once.
            DeadlineExceeded: its turn came too late.
            Exception: whatever the runner raised for this item alone.
        """
        if self.broken:
            raise self.broken
        if not begun:
            self.check_room(pixels=pixels, bytes=bytes, deadline=deadline)
        entry: _Entry[Item, Result] = _Entry(
            item, key, pixels, bytes, deadline, self._clock(), next(self._order), asyncio.Future()
        )
        self._buckets.setdefault(key, deque()).append(entry)
        self._count(entry, +1)
        self._pump_soon()
        try:
            return await entry.future
        except asyncio.CancelledError:
            bucket = self._buckets.get(key)
            if bucket and entry in bucket:
                bucket.remove(entry)
                self._leave(entry)
            raise

    def check_room(self, *, pixels: int = 0, bytes: int = 0, deadline: float = math.inf) -> None:
        """Raises:
        QueueFull: the queue has no room for such an item, or would not come to it in time.
        """
        if self.waiting_items >= self._limits.queue_items:
            raise QueueFull(f"{self.waiting_items} requests wait already, the most that may", self.retry_after())
        if self.waiting_items and self.waiting_bytes + bytes > self._limits.queue_bytes:
            raise QueueFull(f"{self.waiting_bytes} bytes wait already, too many to add {bytes}", self.retry_after())
        seconds = _MARGIN * (self.seconds_ahead + self._needed(_work_of(pixels)))
        if self.waiting_items and self._clock() + seconds > deadline:
            raise QueueFull("what waits already leaves too little time before the deadline", self.retry_after(0.5))

    def retry_after(self, share: float = 1.0) -> int:
        """Whole seconds, 1 to 60, in which a share of what waits and runs now will have drained at the pace of late."""
        return min(60, max(1, math.ceil(share * self.seconds_ahead)))

    @property
    def running(self) -> int:
        """Batches that the runner has and has not given back."""
        return len(self._running)

    @property
    def seconds_ahead(self) -> float:
        """In which all that waits or runs will be done at the pace of late, as if the latter had just begun."""
        entries = itertools.chain(*self._buckets.values(), *self._running.values())
        return self._needed(sum(entry.work for entry in entries)) / self._limits.in_flight

    # --- inside ---

    def _count(self, entry: _Entry[Item, Result], sign: int) -> None:
        self.waiting_items += sign
        self.waiting_bytes += sign * entry.bytes

    def _leave(self, entry: _Entry[Item, Result]) -> None:
        """Account for an entry that was taken out of its bucket."""
        self._count(entry, -1)
        if not self._buckets[entry.key]:
            del self._buckets[entry.key]

    def _pump_soon(self) -> None:
        """Pump once the callbacks that are ready now have run, so that what is submitted together rides together."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Launch batches as long as the device has room and something waits."""
        self._pumping = False
        while self._buckets and len(self._running) < self._limits.in_flight and not self.broken:
            ready = self._ready()
            if not ready:
                return
            batch = self._take(key := min(ready, key=lambda key: self._buckets[key][0].order))
            if batch:
                self._events.launched(key, len(batch))
                task = asyncio.ensure_future(self._run(key, batch))
                self._running[task] = batch
                task.add_done_callback(self._finished)

    def _ready(self) -> list[Hashable]:
        """Buckets that wait for no more company; where there are none, pumps again when the first is."""
        limits, now = self._limits, self._clock()
        left = {
            key: 0.0 if self._is_full(bucket) else bucket[0].arrived + limits.batch_wait - now
            for key, bucket in self._buckets.items()
        }
        ready = [key for key, seconds in left.items() if seconds <= 0]
        if not ready and self._wake is None:
            self._wake = asyncio.get_running_loop().call_later(min(left.values()), self._woken)
        return ready

    def _is_full(self, bucket: deque[_Entry[Item, Result]]) -> bool:
        """Whether one more of its kind would not ride along."""
        pixels = sum(entry.pixels for entry in bucket) + bucket[-1].pixels
        return len(bucket) >= self._limits.batch_items or pixels > self._limits.batch_pixels

    def _woken(self) -> None:
        self._wake = None
        self._pump()

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._pump()

    def _take(self, key: Hashable) -> list[_Entry[Item, Result]]:
        """The next batch of a bucket, without what was cancelled or is too late; no larger than its deadlines allow."""
        bucket, pixels, work, deadline = self._buckets[key], 0, 0, math.inf
        batch: list[_Entry[Item, Result]] = []
        while bucket and len(batch) < self._limits.batch_items:
            entry = bucket[0]
            # Where nothing runs there is nothing to lose, and an estimate that was too high can mend.
            if self._alive(entry, self._needed(entry.work) if batch or self._running else 0.0):
                pixels, work, deadline = pixels + entry.pixels, work + entry.work, min(deadline, entry.deadline)
                if batch and (pixels > self._limits.batch_pixels or self._clock() + self._needed(work) > deadline):
                    break
                batch.append(entry)
            bucket.popleft()
            self._count(entry, -1)
        if not bucket:
            del self._buckets[key]
        return batch

    def _needed(self, work: int) -> float:
        """Seconds from launch to result for so many pixels, at the pace of late."""
        return work * self._seconds / self._work if self._work else 0.0

    def _alive(self, entry: _Entry[Item, Result], needed: float = 0.0) -> bool:
        """Whether somebody waits for it who would have it in time, if it takes so many seconds."""
        if entry.future.done():
            return False
        left = entry.deadline - self._clock()
        if left < needed:
            said = "the device was not free in time" if left < 0 else "too little of them is left for it"
            entry.future.set_exception(DeadlineExceeded(said))
            return False
        return True

    async def _run(self, key: Hashable, batch: list[_Entry[Item, Result]]) -> None:
        launched = self._clock()
        await self._attempt(key, batch, launched)
        if not any(_delivered(entry) for entry in batch):  # what was given up tells nothing of the pace
            return
        seconds = self._clock() - launched
        self._seconds = 0.8 * self._seconds + seconds
        self._work = 0.8 * self._work + sum(self._done(entry) for entry in batch)

    def _done(self, entry: _Entry[Item, Result]) -> int:
        """The pixels that an entry counted for after all."""
        took = self._took(entry.item, entry.future.result().result) if _delivered(entry) else None
        return entry.work if took is None else _work_of(took)

    async def _attempt(self, key: Hashable, batch: list[_Entry[Item, Result]], launched: float) -> None:
        try:
            results = await self._runner(key, [entry.item for entry in batch], lambda: _awaited(batch))
            if len(results) != len(batch):
                raise RuntimeError(f"the runner gave {len(results)} results for {len(batch)} items")
        except DeviceBroken as error:
            self._break(error, batch)
        except Exception as error:
            if not _awaited(batch):
                return
            if len(batch) == 1:
                _fail(batch[0], error)
                return
            self._events.retried(error)
            middle = len(batch) // 2
            for half in (batch[:middle], batch[middle:]):
                alive = [entry for entry in half if self._alive(entry)]
                if alive and not self.broken:
                    await self._attempt(key, alive, launched)
                elif self.broken:
                    self._break(self.broken, alive)
        else:
            for entry, result in zip(batch, results):
                if not entry.future.done():
                    entry.future.set_result(Done(result, launched - entry.arrived))

    def _break(self, error: DeviceBroken, batch: list[_Entry[Item, Result]]) -> None:
        """Tell everyone that the device is gone."""
        self.broken = error
        waiting = [entry for bucket in self._buckets.values() for entry in bucket]
        self._buckets.clear()
        for entry in waiting:
            self._count(entry, -1)
        for entry in batch + waiting:
            _fail(entry, error)


def _work_of(pixels: int) -> int:
    return max(_LEAST_PIXELS, pixels)


def _awaited(batch: Sequence[_Entry[Item, Result]]) -> bool:
    return not all(entry.future.done() for entry in batch)


def _delivered(entry: _Entry[Item, Result]) -> bool:
    return entry.future.done() and not entry.future.cancelled() and entry.future.exception() is None


def _fail(entry: _Entry[Item, Result], error: Exception) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
