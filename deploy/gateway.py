"""An example of a camera gateway: frames of a camera or a folder, compressed at a rate or within a budget, and kept.

    python -m deploy.gateway FRAMES OUT --url http://limpid:8000 --max-bytes 40000 --camera http://cam/stream.mjpg

A frame lies whole in the folder FRAMES before anything else happens to it (it has not changed for --settle seconds),
and leaves it only when its bitstream lies whole in OUT. So neither a restart of the service nor one of this gateway
loses a frame: what is in FRAMES and not in OUT is still to do. Without --camera, another program (an FTP server, say)
puts the frames there, and they stay there unless --delete is given. A frame that the service refuses goes to
OUT/refused with the reason beside it. What is not the frame's fault (a wrong key or address, no answer in time) is
logged, and the frame tried again. A new frame of a name that has its result already is another one: what becomes of it
has the time in its name.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import logging
import os
import random
import signal
import stat
import time
from pathlib import Path
from typing import TypedDict

from deploy.camera import camera_frames
from service.arguments import not_negative, positive
from service.budget import MOST_BPP
from service.calls import base_url
from service.client import AsyncClient, LimpidError, Policy, RequestRefused
from service.codec.config import MOST_EFFORT
from service.files import PHOTO_ENDINGS, write_whole

log = logging.getLogger("gateway")

ATTEMPTS = 1000
"""Of one call, within its deadline; the gateway then takes the frame up again."""

PAUSE, LONGEST_PAUSE, MOST_ASKED = 5.0, 60.0, 600.0
"""Seconds before a frame that is not to blame is tried again; ever longer where OUT cannot be written, and where a
service, or a proxy before it, asks for more time, at most that."""

LOOKING = 0.1
"""Share of the time that looks for frames may take: where a folder holds very many files, they come less often."""

BLAMELESS = frozenset({"invalid-api-key", "not-found", "malformed-request", "unknown-model", "unexpected-answer"})
"""What the service, or something before it, says when the gateway is set up wrongly."""


class Goal(TypedDict, total=False):
    """What `AsyncClient.compress` is asked for: one of the first three, or none for the service's own rate point."""

    rate: int | None
    max_bytes: int | None
    target_bpp: float | None
    model: str | None
    effort: int | None


State = tuple[int, int]
"""Of a file: its size, and when it last changed."""


def is_frame(name: str) -> bool:
    """Whether a file of that name is one to send; others are left alone."""
    return name.lower().endswith(PHOTO_ENDINGS) and not name.startswith(".")


def state_of(path: Path) -> State:
    """Raises:
    OSError: it is not there, or is no file.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError("it is no file")
    return state.st_size, state.st_mtime_ns


_NEARLY_TWO_SECONDS = 1_700_000_001_999_999_999
_COARSEST = 10**7


def coarseness(folder: Path) -> int:
    """Nanoseconds that the file system cuts from a file's time: 99 on NTFS and SMB, 10 ms on exFAT, at most that."""
    probe = folder / f".probe.{os.getpid()}"
    probe.write_bytes(b"")
    try:
        os.utime(probe, ns=(_NEARLY_TWO_SECONDS, _NEARLY_TWO_SECONDS))
        return min(_COARSEST, abs(state_of(probe)[1] - _NEARLY_TWO_SECONDS))
    finally:
        probe.unlink()


def _move(path: Path, kept: Path) -> None:
    """Over what is there. Between file systems, where nothing can be moved, what is there stays."""
    try:
        path.replace(kept)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        path.unlink()


class Unwritten(Exception):
    """What became of a frame could not be written into OUT."""


class Gateway:
    """Sends what lies in `frames` and has no result in `out` yet, oldest name first, `at_once` frames at a time."""

    def __init__(
        self, limpid: AsyncClient, frames: Path, out: Path, goal: Goal, at_once: int, delete: bool, settle: float = 0
    ) -> None:
        self.limpid, self.frames, self.out, self.goal, self.delete = limpid, frames, out, goal, delete
        self.refused = out / "refused"
        self.refused.mkdir(parents=True, exist_ok=True)
        frames.mkdir(parents=True, exist_ok=True)
        self._coarseness = coarseness(out)
        self._room = asyncio.Semaphore(at_once)
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self.settle = settle
        self._seen: dict[str, tuple[State, float]] = {}
        self._done: dict[str, tuple[State, str]] = {}
        self._told: set[str] = set()
        self._pause = PAUSE
        if delete:
            self._delete_leftovers()

    async def run(self, stop: asyncio.Event, poll: float = 0.25) -> None:
        """Work until `stop`; what is under way then is given up, and its frame stays for the next time."""
        taking, stopped = asyncio.create_task(self._take_up(poll)), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((taking, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = [taking, stopped, *self._under_way.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not taking.cancelled():
            taking.result()  # it ends of itself only by an error

    async def _take_up(self, poll: float) -> None:
        while True:
            began = time.monotonic()
            try:
                waiting = await asyncio.to_thread(self.waiting)
            except OSError as error:  # of a folder that is away for a while, as network shares are
                log.error("%s", error)
                await asyncio.sleep(PAUSE)
                continue
            took = time.monotonic() - began
            for path, state in waiting:
                await self._room.acquire()
                self._under_way[path.name] = asyncio.create_task(self._send(path, state))
            await asyncio.sleep(max(poll, took / LOOKING))

    def waiting(self) -> list[tuple[Path, State]]:
        """Frames to send: complete (as they were `settle` seconds ago and at the last look), and without a result.

        Raises:
            OSError: a folder is away.
        """
        found = []
        seen: dict[str, tuple[State, float]] = {}
        done: dict[str, tuple[State, str]] = {}
        now = time.monotonic()
        self.refused.stat()  # or, while OUT is away, all would seem to be to do
        folders = (self.out, self.refused) if self._done else ()
        results = {f"{folder}/{name}" for folder in folders for name in os.listdir(folder)}
        names = sorted(filter(is_frame, os.listdir(self.frames)))
        self._told &= set(names)
        for name in names:
            if name in self._under_way:
                continue
            path = self.frames / name
            try:
                state = state_of(path)
                known = self._done.get(name)
                if known and known[0] == state and known[1] in results:  # there may be many of them
                    done[name] = known
                    continue
                if of_it := self._results_of(path, state)[1]:
                    done[name] = state, str(of_it[0])
                    continue
                if not os.access(path, os.R_OK):
                    state_of(path)  # which tells what went meanwhile
                    raise PermissionError("it may not be read")
            except FileNotFoundError:  # somebody took it away
                continue
            except OSError as error:
                if name not in self._told:
                    log.error("%s: %s; it is left alone for now", name, error)
                    self._told.add(name)
                continue
            self._told.discard(name)
            before, since = self._seen.get(name, (None, now))
            seen[name] = state, since if state == before else now
            if state == before and now - since >= self.settle:
                found.append((path, state))
        self._seen, self._done = seen, done
        return found

    def _delete_leftovers(self) -> None:
        """Delete the frames whose results a stop let be written, but that it left behind.

        A frame that came after its result is another one; ctime tells, whatever mtime it was given.
        """
        for path in (self.frames / name for name in os.listdir(self.frames) if is_frame(name)):
            try:
                of_it = self._results_of(path, state_of(path))[1]
                if of_it and path.stat().st_ctime_ns <= max(one.stat().st_ctime_ns for one in of_it):
                    path.unlink()
            except OSError as error:
                log.error("%s: %s", path.name, error)

    def _results(self, name: str) -> list[Path]:
        """What there is of a frame that is done: its bitstream, or the frame itself, refused."""
        return [path for path in (self.out / f"{name}.lmp", self.refused / name) if path.exists()]

    def _results_of(self, path: Path, state: State) -> tuple[str, list[Path]]:
        """The name that the results of a frame have, and those that are there: they have its own time.

        It is the frame's unless an earlier frame took it.
        """
        modified, results = state[1], self._results(path.name)
        if not results or any(abs(state_of(result)[1] - modified) <= self._coarseness for result in results):
            return path.name, results
        later = f"{path.stem}.{modified}{path.suffix}"
        return later, self._results(later)

    async def _send(self, path: Path, state: State) -> None:
        try:
            await self._work(path, state)
        except Unwritten as error:
            log.error("%s: %s", path.name, error)
            pause, self._pause = self._pause, min(LONGEST_PAUSE, 2 * self._pause)
            await asyncio.sleep(pause)
        except FileNotFoundError:  # somebody took it away
            pass
        except OSError as error:
            log.error("%s: %s", path.name, error)
            await asyncio.sleep(1)
        finally:
            del self._under_way[path.name]
            self._room.release()

    async def _work(self, path: Path, state: State) -> None:
        """Send a frame that was in `state` when it was complete; whatever changes meanwhile is sent again."""
        if state_of(path) != state:
            return
        name = self._results_of(path, state)[0]
        try:
            done = await self.limpid.compress(path, **self.goal)
        except LimpidError as error:
            if isinstance(error, RequestRefused) and error.kind not in BLAMELESS:
                frame = await asyncio.to_thread(path.read_bytes)
                reason, kept = self.refused / f"{name}.txt", self.refused / name
                results = {reason: f"{error}\n".encode(), kept: frame}
                if await asyncio.to_thread(self._conclude, path, state, results, kept):
                    log.error("%s is refused: %s", path.name, error)
            else:
                log.warning("%s waits: %s", path.name, error)
                pause = min(MOST_ASKED, max(PAUSE, error.retry_after))
                await asyncio.sleep(pause * random.uniform(1, 1.5))  # or all cameras come at once
            return
        if await asyncio.to_thread(self._conclude, path, state, {self.out / f"{name}.lmp": done.bitstream}):
            said = {"frame": name, "bytes": len(done.bitstream), "rate": done.rate, "found": done.degradations}
            log.info(json.dumps(said))

    def _conclude(self, path: Path, state: State, results: dict[Path, bytes], kept: Path | None = None) -> bool:
        """Write what became of a frame and delete it if told so. False: it is another one by now.

        In one go, which a stop does not interrupt. Where the frame itself is `kept`, it moves there, over its copy: it
        may be a part, whose writer has it open still, and then the rest comes after it.
        """
        if state_of(path) == state:
            try:
                for result, content in results.items():
                    write_whole(result, content, modified=state[1])
            except OSError as error:
                raise Unwritten(str(error)) from error
            self._pause = PAUSE
            if state_of(path) == state:
                if self.delete:
                    _move(path, kept) if kept else path.unlink()
                return True
            for result in results:
                result.unlink()
        log.warning("%s changed while it was sent, and is sent again", path.name)
        return False


async def _film(url: str, every: float | None, frames: Path, max_waiting: int) -> None:
    """Put the camera's frames into the folder, named by the time; beyond `max_waiting` of them new ones are dropped."""
    async for frame in camera_frames(url, every):
        try:
            if sum(map(is_frame, os.listdir(frames))) >= max_waiting:
                log.error("%d frames wait, a new one is dropped", max_waiting)
                continue
            await asyncio.to_thread(write_whole, frames / f"{time.time_ns()}.jpg", frame)
        except OSError as error:
            log.error("a frame cannot be kept: %s", error)


async def greet(url: str, limpid: AsyncClient, goal: Goal) -> None:
    """Say at once what a frame would tell only later: that no service answers there, or not to this key or goal."""
    url = str(base_url(url).copy_with(userinfo=b""))  # a password is nobody's to read in a log
    try:
        offered = await limpid.variants(policy=Policy(deadline=5, attempts=1))
    except LimpidError as error:
        log.warning("%s: %s; frames wait for it", url, error)
        return
    served = [model["name"] for model in offered["models"]]
    log.info("%s serves %s", url, ", ".join(served))
    if (model := goal.get("model")) and model not in served:
        log.error("%s has no model %s; frames wait until it does", url, model)
    if (effort := goal.get("effort") or 0) > (most := offered.get("max_effort", 0)):
        log.error("%s allows an effort of %d at most, not %d; frames wait until it does", url, most, effort)


async def _main(args: argparse.Namespace, limpid: AsyncClient, gateway: Gateway) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with limpid:
        camera = None
        if args.camera:
            camera = asyncio.create_task(_film(args.camera, args.every, args.frames, args.max_waiting))
            camera.add_done_callback(lambda _: stop.set())  # a gateway that films no more shall end, and be restarted
        greeting = asyncio.create_task(greet(args.url, limpid, gateway.goal))
        await gateway.run(stop)
        greeting.cancel()
        if camera and camera.done():
            camera.result()
        elif camera:
            camera.cancel()


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m deploy.gateway", description=__doc__.split("\n", 1)[0])
    parser.add_argument("frames", type=Path, help="folder of the frames that wait")
    parser.add_argument("out", type=Path, help="folder of the bitstreams")
    parser.add_argument("--url", required=True, help="the service")
    parser.add_argument("--api-key", help="where the service wants one, else LIMPID_API_KEY")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rate", type=int, choices=range(1, 9), metavar="1..8", help="rate point of every frame")
    size.add_argument(
        "--max-bytes", type=positive(int), help="budget of one frame; takes about three times as long as a rate"
    )
    size.add_argument("--target-bpp", type=positive(float, MOST_BPP), help="the same in bits per pixel")
    parser.add_argument("--model", help="name of a model of the service, else its default")
    parser.add_argument(
        "--effort",
        type=int,
        choices=range(MOST_EFFORT + 1),
        default=0,
        metavar=f"0..{MOST_EFFORT}",
        help="rounds of refinement",
    )
    parser.add_argument(
        "--settle",
        type=not_negative,
        default=2,
        help="seconds for which a frame of the folder is unchanged; longer than its writer ever pauses",
    )
    parser.add_argument("--deadline", type=positive(float), default=60, help="seconds that a frame may take")
    parser.add_argument("--at-once", type=positive(int), default=4, help="frames under way at a time")
    parser.add_argument(
        "--camera", metavar="URL", help="an MJPEG stream or a JPEG snapshot; its frames are then deleted"
    )
    parser.add_argument(
        "--every", type=positive(float), help="seconds between frames; else a snapshot a second, or all of a stream"
    )
    parser.add_argument(
        "--max-waiting", type=positive(int), default=10_000, help="frames of the camera kept while they wait"
    )
    parser.add_argument("--delete", action="store_true", help="delete a frame once its bitstream is written")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    patience = Policy(deadline=args.deadline, attempts=ATTEMPTS)
    goal = Goal(
        rate=args.rate,
        max_bytes=args.max_bytes,
        target_bpp=args.target_bpp,
        model=args.model,
        effort=args.effort or None,
    )
    delete = args.delete or bool(args.camera)
    settle = 0 if args.camera else args.settle  # the camera's frames are written whole
    try:
        if args.camera:
            args.camera = str(base_url(args.camera))
        limpid = AsyncClient(args.url, args.api_key or os.environ.get("LIMPID_API_KEY"), patience)
        gateway = Gateway(limpid, args.frames, args.out, goal, args.at_once, delete, settle)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    asyncio.run(_main(args, limpid, gateway))


if __name__ == "__main__":
    main()
