"""`service.batching`: simulated devices, an injected clock, and everything that can happen to a batch."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching import Batcher, DeadlineExceeded, DeviceBroken, Done, Events, Limits, QueueFull


class Device:
    """A simulated device on a simulated clock: batches run until `step` lets them end, in the order of launch."""

    def __init__(self) -> None:
        self.now = 0.0
        self.launches: list[tuple[Hashable, list[int]]] = []
        self.gates: list[asyncio.Event] = []
        self.poison: set[int] = set()
        self.broken = False
        self.awaited: Callable[[], bool] = lambda: True

    def clock(self) -> float:
        return self.now

    async def run(self, key: Hashable, items: Sequence[int], awaited: Callable[[], bool]) -> list[int]:
        gate = asyncio.Event()
        self.awaited = awaited
        self.launches.append((key, list(items)))
        self.gates.append(gate)
        await gate.wait()
        if self.broken:
            raise DeviceBroken("gone")
        if self.poison & set(items):
            raise ValueError(f"poison in {items}")
        return [10 * item for item in items]

    async def step(self, seconds: float = 1.0) -> bool:
        """Let the oldest running batch end. Returns whether there was one."""
        await settle()
        self.now += seconds
        waiting = [gate for gate in self.gates if not gate.is_set()]
        if waiting:
            waiting[0].set()
        await settle()
        return bool(waiting)

    async def finish(self) -> None:
        while await self.step():
            pass


async def settle() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


def simulate(scenario: Callable[[Device, Callable[..., Batcher[int, int]]], Awaitable[None]]) -> None:
    async def main() -> None:
        device = Device()

        def batcher(**limits: float) -> Batcher[int, int]:
            options = {"in_flight": 1, **limits}
            return Batcher(device.run, Limits(**options), device.clock)  # type: ignore[arg-type]

        await scenario(device, batcher)

    asyncio.run(main())


def submit(batcher: Batcher[int, int], item: int, key: Hashable = "a", **options: float) -> asyncio.Task[Done[int]]:
    return asyncio.ensure_future(batcher.submit(item, key, **options))  # type: ignore[arg-type]


def test_an_idle_device_starts_at_once_and_a_busy_one_gathers() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make()
        tasks = [submit(batcher, 0)]
        await settle()
        assert device.launches == [("a", [0])]
        tasks += [submit(batcher, item) for item in range(1, 6)]
        await device.step()
        assert device.launches[1] == ("a", [1, 2, 3, 4, 5])
        await device.finish()
        assert [(await task).result for task in tasks] == [0, 10, 20, 30, 40, 50]
        assert (await tasks[0]).queued == 0
        assert (await tasks[5]).queued == 1

    simulate(scenario)


def test_the_bucket_with_the_oldest_head_goes_first_and_keys_never_mix() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make()
        keys = ["a", "b", "c", "b", "a", "c", "b"]
        tasks = []
        for item, key in enumerate(keys):
            tasks.append(submit(batcher, item, key))
            await settle()
        await device.finish()
        await asyncio.gather(*tasks)
        assert device.launches == [("a", [0]), ("b", [1, 3, 6]), ("c", [2, 5]), ("a", [4])]

    simulate(scenario)


def test_caps_in_items_and_pixels_hold_but_one_large_item_still_runs() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make(batch_items=3, batch_pixels=100)
        pixels = [500, 40, 40, 40, 10, 10, 10, 10]
        tasks = []
        for item, size in enumerate(pixels):
            tasks.append(submit(batcher, item, pixels=size))
            await settle()
        await device.finish()
        await asyncio.gather(*tasks)
        assert [items for _, items in device.launches] == [[0], [1, 2], [3, 4, 5], [6, 7]]

    simulate(scenario)


def test_two_batches_in_flight_overlap() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make(in_flight=2)
        tasks = []
        for item in range(5):
            tasks.append(submit(batcher, item))
            await settle()
        assert device.launches == [("a", [0]), ("a", [1])]
        await device.finish()
        await asyncio.gather(*tasks)
        assert device.launches[2] == ("a", [2, 3, 4])

    simulate(scenario)


def test_a_poisoned_item_fails_alone() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make()
        device.poison = {5}
        first = submit(batcher, 100)
        await settle()
        tasks = [submit(batcher, item) for item in range(8)]
        await device.finish()
        assert device.launches[1] == ("a", list(range(8)))
        assert (await first).result == 1000
        for item, task in enumerate(tasks):
            if item == 5:
                with pytest.raises(ValueError, match=r"poison in \[5\]"):
                    await task
            else:
                assert (await task).result == 10 * item

    simulate(scenario)


def test_a_cancelled_item_is_dropped_before_launch_and_frees_its_place() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make(queue_items=3)
        tasks = [submit(batcher, 0, bytes=7)]
        await settle()
        tasks += [submit(batcher, item, bytes=7) for item in range(1, 4)]
        await settle()
        assert (batcher.waiting_items, batcher.waiting_bytes) == (3, 21)
        with pytest.raises(QueueFull):
            await batcher.submit(9, "a")
        tasks[2].cancel()
        await settle()
        assert (batcher.waiting_items, batcher.waiting_bytes) == (2, 14)
        tasks.append(submit(batcher, 4))
        tasks[0].cancel()  # it runs already: its batch goes on, its result is nobody's
        await device.finish()
        assert [items for _, items in device.launches] == [[0], [1, 3, 4]]
        assert (batcher.waiting_items, batcher.waiting_bytes) == (0, 0)

    simulate(scenario)


def test_an_expired_item_is_told_so_and_not_run() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make()
        tasks = [submit(batcher, 0)]
        await settle()
        tasks += [submit(batcher, 1, deadline=5), submit(batcher, 2, deadline=50)]
        await device.step(10)
        await device.finish()
        with pytest.raises(DeadlineExceeded):
            await tasks[1]
        assert (await tasks[2]).result == 20
        assert [items for _, items in device.launches] == [[0], [2]]

    simulate(scenario)


def test_what_would_not_be_done_in_time_is_not_begun() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make(in_flight=2, batch_items=1)
        tasks = [submit(batcher, 0, pixels=10)]
        await device.step(10)  # a second per pixel
        tasks += [submit(batcher, item, pixels=10) for item in (1, 2)]
        await settle()
        tasks += [submit(batcher, 3, pixels=10, deadline=20), submit(batcher, 4, pixels=10, deadline=45)]
        await device.step(5)  # at 15, and 0.7 seconds per pixel by now
        with pytest.raises(DeadlineExceeded, match="too little of them is left"):
            await tasks[3]
        await device.finish()
        assert [(await task).result for task in (*tasks[:3], tasks[4])] == [0, 10, 20, 40]
        assert [items for _, items in device.launches] == [[0], [1], [2], [4]]
        alone = submit(batcher, 5, pixels=10**6, deadline=device.now + 1)  # the pace may be wrong, and nothing is lost
        await device.finish()
        assert (await alone).result == 50

    simulate(scenario)


def test_a_small_photo_does_not_make_a_large_one_hopeless() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make(batch_items=1)
        tasks = []
        for item in range(30):  # a twentieth of a second each, whatever is in them
            tasks.append(submit(batcher, item, pixels=256))
            await device.step(0.05)
        tasks += [submit(batcher, item, pixels=12_000_000) for item in (30, 31)]
        await settle()
        tasks.append(submit(batcher, 32, pixels=12_000_000, deadline=device.now + 60))
        await device.finish()
        assert (await tasks[-1]).result == 320

    simulate(scenario)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Where waiting takes no time."""

    def __init__(self) -> None:
        selector = selectors.SelectSelector()
        super().__init__(selector)
        self.now, look = 0.0, selector.select

        def select(timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            self.now += timeout or 0.0
            return look(0)

        selector.select = select  # type: ignore[method-assign]

    def time(self) -> float:
        return self.now


def test_what_would_come_too_late_behind_what_waits_is_refused_at_once() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make(batch_items=1)
        tasks = [submit(batcher, 0, pixels=10)]
        await device.step(10)  # a second per pixel
        tasks += [submit(batcher, 1, pixels=10, deadline=21)]  # behind nothing
        await settle()
        tasks += [submit(batcher, item, pixels=10) for item in (2, 3)]
        await settle()
        with pytest.raises(QueueFull, match="too little time") as caught:
            await batcher.submit(4, "a", pixels=10, deadline=10 + 40)
        assert caught.value.retry_after == 15  # half of what runs and waits
        batcher.check_room(pixels=10, deadline=10 + 51)
        with pytest.raises(QueueFull, match="too little time"):
            batcher.check_room(deadline=10 + 37)
        with pytest.raises(QueueFull, match="too little time"):
            await batcher.submit(4, "b", pixels=10, deadline=10 + 40)
        tasks += [submit(batcher, 4, pixels=10, deadline=10 + 51)]
        tasks += [asyncio.ensure_future(batcher.submit(5, "a", pixels=10, deadline=10 + 60, begun=True))]
        while await device.step(10):
            pass
        assert [(await task).result for task in tasks] == [0, 10, 20, 30, 40, 50]
        tasks = [submit(batcher, item, pixels=10, deadline=device.now + 26) for item in (6, 7)]
        await device.finish()
        assert [(await task).result for task in tasks] == [60, 70], "what is done is not ahead of anybody"

    simulate(scenario)


def test_an_overloaded_device_works_on_what_somebody_gets() -> None:
    """64 cameras with a photo each under way, 1.3 seconds a photo and 60 seconds of patience: 83 would be needed."""
    chance, done, late = random.Random(1), 0, 0

    async def main() -> None:
        device, clock = asyncio.Lock(), asyncio.get_running_loop().time

        async def run(_: Hashable, items: Sequence[int], awaited: Callable[[], bool]) -> Sequence[int]:
            async with device:
                for _ in range(4 * len(items)):
                    if not awaited():
                        raise RuntimeError("nobody waits")
                    await asyncio.sleep(1.3 / 4 * chance.uniform(0.85, 1.15))
            return items

        batcher = Batcher(run, Limits(), clock)

        async def camera() -> None:
            nonlocal done, late
            await asyncio.sleep(30 * chance.random())
            while clock() < 1200:
                try:
                    async with asyncio.timeout(60):
                        await batcher.submit(0, "1920x1080", pixels=2_100_000, deadline=clock() + 60)
                    done += clock() > 120
                except QueueFull as busy:
                    await asyncio.sleep(busy.retry_after * chance.uniform(1, 1.25))
                except TimeoutError:
                    late += 1
                    await asyncio.sleep(chance.uniform(2, 8))

        await asyncio.gather(*(camera() for _ in range(64)))

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(main())
    assert 1.3 * done > 0.95 * (1200 - 120)  # 0.14 where what is about to expire is begun
    assert late < 0.05 * done  # most of them where nobody is refused for lack of time


def test_a_batch_grows_no_larger_than_its_deadlines_allow() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make()
        tasks = [submit(batcher, 0, pixels=10)]
        await device.step(10)
        tasks.append(submit(batcher, 1, pixels=10))
        await settle()
        tasks += [submit(batcher, item, pixels=10, deadline=48 if item == 3 else 1000) for item in range(2, 6)]
        await device.step(10)  # at 20: two of them would be done at 40, three at 50
        await device.finish()
        assert [(await task).result for task in tasks] == [0, 10, 20, 30, 40, 50]
        assert [items for _, items in device.launches] == [[0], [1], [2, 3], [4, 5]]

    simulate(scenario)


def test_what_was_given_up_tells_nothing_of_the_pace() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make(queue_items=4, batch_items=1)
        first = submit(batcher, 0, pixels=1)
        await device.step(3)
        assert (await first).result == 0
        device.poison = {1}
        for _ in range(5):
            given_up = submit(batcher, 1, pixels=1)
            await settle()
            given_up.cancel()
            await device.step(0.01)
        waiting = [submit(batcher, 2, pixels=1)]
        await settle()
        waiting += [submit(batcher, item, pixels=1) for item in range(3, 7)]
        await settle()
        assert batcher.retry_after() == 15  # one runs, four wait
        await device.finish()
        assert [(await task).result for task in waiting] == [20, 30, 40, 50, 60]

    simulate(scenario)


def test_a_full_queue_says_when_to_come_back() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make(queue_items=4, batch_items=1, queue_bytes=100)
        done = [submit(batcher, item, pixels=1) for item in range(2)]
        await device.step(3)
        await device.step(3)
        await asyncio.gather(*done)
        tasks = [submit(batcher, 0, bytes=10, pixels=1)]
        await settle()
        tasks += [submit(batcher, item, bytes=10, pixels=1) for item in range(1, 5)]
        await settle()
        with pytest.raises(QueueFull, match="4 requests wait") as caught:
            await batcher.submit(9, "a")
        assert caught.value.retry_after == 15  # one runs, four wait
        tasks[4].cancel()
        await settle()
        with pytest.raises(QueueFull, match="30 bytes wait"):
            await batcher.submit(9, "a", bytes=71)
        await device.finish()

    simulate(scenario)


def test_a_broken_device_is_told_to_everyone_and_stays_broken() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make()
        tasks = [submit(batcher, item, key) for item, key in enumerate("aab")]
        await settle()
        tasks.append(submit(batcher, 3))
        device.broken = True
        await device.finish()
        for task in tasks:
            with pytest.raises(DeviceBroken):
                await task
        with pytest.raises(DeviceBroken):
            await batcher.submit(9, "a")
        assert batcher.waiting_items == 0
        assert len(device.launches) == 1

    simulate(scenario)


def test_items_that_are_submitted_together_ride_together() -> None:
    async def scenario(device: Device, make: Callable[..., Batcher[int, int]]) -> None:
        batcher = make(in_flight=2)
        await settle()
        together = asyncio.gather(*(batcher.submit(item, "a") for item in range(4)))
        await settle()
        assert device.launches == [("a", [0, 1, 2, 3])]
        await device.finish()
        await together

    simulate(scenario)


def test_a_batch_that_nobody_waits_for_may_end_and_is_not_tried_again() -> None:
    async def scenario(device: Device, batcher: Callable[..., Batcher[int, int]]) -> None:
        device.poison = {1}  # so it ends with an error
        of = batcher()
        first, second = submit(of, 1), submit(of, 2)
        await settle()
        first.cancel()
        await settle()
        assert device.awaited()
        second.cancel()
        await settle()
        assert not device.awaited()
        third = submit(of, 3)
        await device.finish()
        assert (await third).result == 30
        assert device.launches == [("a", [1, 2]), ("a", [3])]

    simulate(scenario)


def test_waiting_on_purpose_is_off_by_default_and_bounded_when_on() -> None:
    async def main() -> None:
        launches = []

        async def run(key: Hashable, items: Sequence[int], _: Callable[[], bool]) -> Sequence[int]:
            launches.append(list(items))
            return items

        at_once: Batcher[int, int] = Batcher(run)
        first = asyncio.ensure_future(at_once.submit(7, "a"))
        await settle()
        assert launches.pop() == [7]
        await first
        waits: Batcher[int, int] = Batcher(run, Limits(batch_wait=0.2, batch_items=3))
        first = asyncio.ensure_future(waits.submit(0, "a"))
        await settle()
        assert not launches
        await waits.submit(1, "a")
        assert launches.pop() == [0, 1]
        await first
        async with asyncio.timeout(0.15):  # a full one waits for nothing
            await asyncio.gather(*(waits.submit(item, "a") for item in range(3)))
        assert launches.pop() == [0, 1, 2]
        lonely = asyncio.ensure_future(waits.submit(0, "b"))
        await settle()
        async with asyncio.timeout(0.15):  # nor behind one of another key that does
            await asyncio.gather(*(waits.submit(item, "a") for item in range(3)))
        assert launches.pop() == [0, 1, 2]
        await lonely
        assert launches.pop() == [0]
        large: Batcher[int, int] = Batcher(run, Limits(batch_wait=1, batch_pixels=100))
        async with asyncio.timeout(0.5):  # nor one that no other could join
            await large.submit(0, "a", pixels=60)
        assert launches.pop() == [0]

    asyncio.run(main())


def test_work_that_has_begun_is_not_refused_for_lack_of_room() -> None:
    async def main() -> None:
        async def run(key: Hashable, items: Sequence[int], _: Callable[[], bool]) -> Sequence[int]:
            await asyncio.sleep(0.02)
            return items

        full: Batcher[int, int] = Batcher(run, Limits(queue_items=1, queue_bytes=10, in_flight=1))
        waiting = []
        for _ in range(2):  # one runs, one waits
            waiting.append(asyncio.ensure_future(full.submit(0, "a", bytes=10)))
            await asyncio.sleep(0.005)
        with pytest.raises(QueueFull):
            await full.submit(1, "a", bytes=10)
        assert (await full.submit(2, "a", bytes=10, begun=True)).result == 2
        await asyncio.gather(*waiting)
        assert full.waiting_bytes == 0

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(main())


def test_everybody_is_told_when_the_device_breaks_while_a_batch_is_halved() -> None:
    async def main() -> None:
        async def run(key: Hashable, items: Sequence[int], _: Callable[[], bool]) -> Sequence[int]:
            if len(items) > 1:
                raise ValueError("halve me")
            raise DeviceBroken("gone")

        batcher: Batcher[int, int] = Batcher(run)
        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(*(batcher.submit(item, "a") for item in range(4)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [DeviceBroken] * 4

    asyncio.run(main())


def test_too_few_results_are_an_error_not_a_wait() -> None:
    async def main() -> None:
        async def run(key: Hashable, items: Sequence[int], _: Callable[[], bool]) -> Sequence[int]:
            return []

        async with asyncio.timeout(5):
            with pytest.raises(RuntimeError, match="0 results for 1"):
                await Batcher[int, int](run).submit(1, "a")

    asyncio.run(main())


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_happens_each_item_is_answered_once_in_order_and_none_starves(data: st.DataObject) -> None:
    """Random arrivals, keys, sizes, cancellations, poison and device times, against the promises of the batcher."""
    limits = Limits(
        batch_items=data.draw(st.integers(1, 5)),
        batch_pixels=data.draw(st.integers(1, 60)),
        queue_items=data.draw(st.integers(1, 30)),
        in_flight=data.draw(st.integers(1, 3)),
    )
    actions = data.draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("submit"), st.sampled_from("abc"), st.integers(0, 30)),
                st.tuples(st.just("cancel"), st.integers(0, 40), st.just(0)),
                st.tuples(st.just("step"), st.just(0), st.just(0)),
            ),
            max_size=40,
        )
    )
    poison = data.draw(st.sets(st.integers(0, 40), max_size=3))

    async def main() -> None:
        device, launched = Device(), []
        retried: list[Exception] = []
        device.poison = poison
        events = Events(lambda key, items: launched.append((key, items)), retried.append)
        batcher: Batcher[int, int] = Batcher(device.run, limits, device.clock, events)
        tasks: list[asyncio.Task[Done[int]]] = []
        keys: dict[int, str] = {}
        for action, value, pixels in actions:
            if action == "submit":
                keys[len(tasks)] = str(value)
                tasks.append(submit(batcher, len(tasks), str(value), pixels=int(pixels)))
            elif action == "cancel" and int(value) < len(tasks):
                tasks[int(value)].cancel()
            else:
                await device.step()
            await settle()
            assert batcher.waiting_items <= limits.queue_items
            running = sum(not gate.is_set() for gate in device.gates)
            assert running <= limits.in_flight
            # Work-conserving: nothing waits while the device has room.
            assert not (batcher.waiting_items and running < limits.in_flight)
        await device.finish()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for item, outcome in enumerate(outcomes):
            if isinstance(outcome, Done):
                assert outcome.result == 10 * item
                assert item not in poison
            elif isinstance(outcome, ValueError):
                assert item in poison
            else:
                assert isinstance(outcome, QueueFull | asyncio.CancelledError)
        assert (batcher.waiting_items, batcher.waiting_bytes) == (0, 0)
        if not retried:
            assert launched == [(key, len(items)) for key, items in device.launches]
        else:
            assert poison
        first_launch: dict[int, int] = {}
        for number, (key, items) in enumerate(device.launches):
            assert len(items) <= limits.batch_items
            for item in items:
                assert keys[item] == key
                first_launch.setdefault(item, number)
        by_key = defaultdict(list)
        for item, number in first_launch.items():
            by_key[keys[item]].append((item, number))
        for listed in by_key.values():  # first in, first out within a bucket
            numbers = [number for _, number in sorted(listed)]
            assert numbers == sorted(numbers)

    asyncio.run(main())
