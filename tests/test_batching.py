"""`service.batching`: one at a time, in order, bounded, and no item's trouble is another's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from service.batching import QueueFull, SerialQueue


def test_items_run_one_at_a_time_in_order_across_queues() -> None:
    running, most, order = 0, 0, []

    def run(items: Sequence[int]) -> list[int]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        order.extend(items)
        threading.Event().wait(0.01)
        running -= 1
        return [10 * item for item in items]

    async def main() -> list[int]:
        device = asyncio.Lock()
        queues = [SerialQueue(run, device, 50), SerialQueue(run, device, 50)]
        done = await asyncio.gather(*(queues[item % 2].submit(item) for item in range(8)))
        assert done[7].queued > done[0].queued
        return [one.result for one in done]

    assert asyncio.run(main()) == [10 * item for item in range(8)]
    assert most == 1
    assert order == list(range(8))


def test_a_failing_item_fails_alone() -> None:
    def run(items: Sequence[int]) -> list[float]:
        return [1 / item for item in items]

    async def main() -> list[object]:
        queue = SerialQueue(run, asyncio.Lock(), 50)
        return await asyncio.gather(*(queue.submit(item) for item in (1, 0, 2)), return_exceptions=True)

    first, second, third = asyncio.run(main())
    assert isinstance(second, ZeroDivisionError)
    assert (first.result, third.result) == (1, 0.5)  # type: ignore[attr-defined]


def test_a_full_queue_says_so_at_once_and_a_cancelled_item_leaves_it() -> None:
    release = threading.Event()

    def run(items: Sequence[int]) -> list[int]:
        release.wait(5)
        return list(items)

    async def main() -> None:
        queue = SerialQueue(run, asyncio.Lock(), 2)
        tasks = [asyncio.create_task(queue.submit(item)) for item in range(3)]
        await asyncio.sleep(0.05)
        assert queue.waiting == 2
        with pytest.raises(QueueFull):
            await queue.submit(9)
        tasks[1].cancel()
        tasks[0].cancel()  # it runs already: the device stays taken until its thread is done
        await asyncio.sleep(0.05)
        assert queue.waiting == 1
        release.set()
        assert (await tasks[2]).result == 2

    asyncio.run(main())
