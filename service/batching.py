"""The queue between requests and the device. For now it runs one item at a time, in order, in a worker thread.

This is the seam of the micro-batcher (DESIGN section 6): routes only know `submit`, the runner already takes lists.
Pure asyncio: knows no torch and no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFull(RuntimeError):
    """As many items wait as the queue holds."""


@dataclass(frozen=True)
class Done(Generic[Result]):
    """A result, and the seconds that the item waited before its run began."""

    result: Result
    queued: float


class SerialQueue(Generic[Item, Result]):
    """Runs items one at a time.

    Args:
        runner: takes a list of items and returns their results in order; called in a worker thread.
        device: shared by the queues of one device, so that only one of them runs at a time.
        max_items: most items that may wait.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        runner: Callable[[Sequence[Item]], Sequence[Result]],
        device: asyncio.Lock,
        max_items: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner, self._device, self._max_items, self._clock = runner, device, max_items, clock
        self.waiting = 0

    async def submit(self, item: Item) -> Done[Result]:
        """Wait for the turn of `item` and run it.

        Raises:
            QueueFull: at once, when too many wait.
            Exception: whatever the runner raised for this item.
        """
        if self.waiting >= self._max_items:
            raise QueueFull(f"{self.waiting} requests wait already, the most that may")
        arrived = self._clock()
        self.waiting += 1
        try:
            await self._device.acquire()
        finally:
            self.waiting -= 1
        queued = self._clock() - arrived
        run = asyncio.ensure_future(asyncio.to_thread(self._runner, [item]))
        # The device is free when the thread is done, not when a cancelled client has gone.
        run.add_done_callback(lambda _: self._device.release())
        (result,) = await asyncio.shield(run)
        return Done(result, queued)
