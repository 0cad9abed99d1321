"""A client of the HTTP service for gateways, sync and async, on httpx.

    with Client("http://localhost:8000", api_key="...") as limpid:
        compressed = limpid.compress(Path("noisy.jpg"), max_bytes=40_000)
        restored = limpid.decompress(compressed.bitstream)

Both calls are idempotent, so a client repeats what failed on the way, what was refused for lack of room (429) and what
met a service that starts or stops (503): with exponential backoff, never earlier than `Retry-After` says, and within
one deadline over all attempts. Connections are reused. Every refusal is a typed error with the service's own words.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError
from contextlib import suppress
from types import TracebackType
from typing import Any

import httpx
from anyio import to_thread

from service.calls import (
    Body,
    BudgetUnmeetable,
    Call,
    Compressed,
    DeadlineExceeded,
    LimpidError,
    Policy,
    RequestRefused,
    Restored,
    ServiceBusy,
    ServiceUnavailable,
    Unauthorized,
    base_url,
    chunks,
    compress_call,
    compressed,
    decompress_call,
    finish,
    key_header,
    restored,
    variants_of,
)

__all__ = [
    "AsyncClient",
    "Body",
    "BudgetUnmeetable",
    "Client",
    "Compressed",
    "DeadlineExceeded",
    "LimpidError",
    "Policy",
    "RequestRefused",
    "Restored",
    "ServiceBusy",
    "ServiceUnavailable",
    "Unauthorized",
]


async def _async_chunks(body: Body) -> AsyncIterator[bytes]:
    """Reads in a thread, so that a slow disk does not block the event loop."""
    each = chunks(body)
    while (chunk := await to_thread.run_sync(next, each, None, abandon_on_cancel=True)) is not None:
        yield chunk


class Client:
    """The service at `url`, for threads: one client may serve many. An `AsyncClient` does the work in one of its own,
    which the first call starts and no fork takes along.

    Args:
        url: such as http://localhost:8000.
        api_key: where the service wants one.
        policy: of every call that states none.
        transport: for tests.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        policy: Policy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._async = AsyncClient(url, api_key, policy, transport)
        self.policy = self._async.policy
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting, self._closed = threading.Lock(), False
        self._process = os.getpid()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends it; whoever still waits gets an error."""
        with self._starting:
            self._closed = True
        if self._loop and self._is_running():
            asyncio.run_coroutine_threadsafe(self._wind_up(), self._loop).result()
            self._stop()

    async def _wind_up(self) -> None:
        await self._end_calls()
        await self._async.close()

    async def _end_calls(self) -> None:
        """What failed and waits to be tried again ends with its failure; what is under way is cancelled."""
        self._async.give_up()
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            _, late = await asyncio.wait(others, timeout=0.1)
            for call in late:
                call.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def give_up(self) -> None:
        """From another thread: ends the calls under way; nothing that failed is tried again from now on."""
        with self._starting:
            if self._loop is None:
                self._async.give_up()
        if self._loop and self._is_running():
            asyncio.run_coroutine_threadsafe(self._end_calls(), self._loop)

    def _is_running(self) -> bool:
        return self._loop is not None and not self._loop.is_closed() and self._process == os.getpid()

    def compress(
        self,
        photo: Body,
        *,
        rate: int | None = None,
        max_bytes: int | None = None,
        target_bpp: float | None = None,
        model: str | None = None,
        effort: int | None = None,
        policy: Policy | None = None,
    ) -> Compressed:
        """Compress a photo, at a rate point from 1 to 8 or the best one within a budget, `effort` from 0 to 8.

        Raises:
            LimpidError: see its subclasses.
        """
        call = compress_call(photo, rate, max_bytes, target_bpp, model, effort, policy or self.policy)
        return compressed(self._send(call))

    def decompress(
        self,
        bitstream: Body,
        *,
        media_type: str = "image/png",
        quality: int | None = None,
        policy: Policy | None = None,
    ) -> Restored:
        """The clean photo of a bitstream.

        Raises:
            LimpidError: see its subclasses.
        """
        return restored(self._send(decompress_call(bitstream, media_type, quality, policy or self.policy)))

    def variants(self, *, policy: Policy | None = None) -> dict[str, Any]:
        """What `GET /variants` says.

        Raises:
            LimpidError: see its subclasses.
        """
        return variants_of(self._send(Call("GET", "/variants", policy or self.policy)))

    def _send(self, call: Call) -> httpx.Response:
        with self._starting:  # so that `close` comes before it, or knows of it
            loop = self._running()
            under_way = asyncio.run_coroutine_threadsafe(self._async.send(call), loop)
        try:
            return under_way.result()
        except CancelledError:
            raise ServiceUnavailable("unreachable", "the call was given up, or the client closed, meanwhile") from None
        finally:
            under_way.cancel()  # where Ctrl-C ended the wait

    def _running(self) -> asyncio.AbstractEventLoop:
        """The loop, which the first call starts; for whoever holds the lock."""
        if self._closed:
            raise RuntimeError("expected an open client, it was closed")
        if self._loop is None:
            self._loop, self._process = asyncio.new_event_loop(), os.getpid()
            thread = threading.Thread(target=_work, args=(self._loop,), name="limpid-client", daemon=True)
            thread.start()
            self._stop = weakref.finalize(self, _stop, self._loop, thread)
            self._stop.atexit = False
        if self._process != os.getpid():
            raise RuntimeError("expected a client that this process used first: make one after the fork")
        return self._loop


def _work(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if thread.is_alive():
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():  # in which a forgotten client may be collected
            thread.join()


class AsyncClient:
    """`Client` for asyncio; the same arguments, calls and errors."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        policy: Policy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self._given_up = asyncio.Event()
        base = base_url(url)
        headers = key_header(api_key, base)
        try:
            self._http = httpx.AsyncClient(base_url=base, headers=headers, transport=transport)
        except (ImportError, OSError, httpx.InvalidURL) as error:
            raise ValueError(
                f"expected proxies and certificates that httpx can use, of HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, "
                f"SSL_CERT_FILE and SSL_CERT_DIR: {error}"
            ) from error

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    def give_up(self) -> None:
        """Nothing that failed is tried again from now on."""
        self._given_up.set()

    async def compress(
        self,
        photo: Body,
        *,
        rate: int | None = None,
        max_bytes: int | None = None,
        target_bpp: float | None = None,
        model: str | None = None,
        effort: int | None = None,
        policy: Policy | None = None,
    ) -> Compressed:
        """See `Client.compress`."""
        call = compress_call(photo, rate, max_bytes, target_bpp, model, effort, policy or self.policy)
        return compressed(await self.send(call))

    async def decompress(
        self,
        bitstream: Body,
        *,
        media_type: str = "image/png",
        quality: int | None = None,
        policy: Policy | None = None,
    ) -> Restored:
        """See `Client.decompress`."""
        return restored(await self.send(decompress_call(bitstream, media_type, quality, policy or self.policy)))

    async def variants(self, *, policy: Policy | None = None) -> dict[str, Any]:
        """See `Client.variants`."""
        return variants_of(await self.send(Call("GET", "/variants", policy or self.policy)))

    async def send(self, call: Call) -> httpx.Response:
        """The good answer of a call; raises `LimpidError`."""
        while True:
            if self._given_up.is_set():
                raise ServiceUnavailable("unreachable", "the client has given up")
            content = call.body if call.body is None or isinstance(call.body, bytes) else _async_chunks(call.body)
            outcome: httpx.Response | httpx.RequestError
            try:
                async with asyncio.timeout(call.left()):
                    outcome = await self._http.request(call.method, call.path, content=content, **call.arguments())
            except httpx.RequestError as error:
                outcome = error
            except TimeoutError:
                outcome = call.too_late()
            pause = call.pause_after(outcome)
            if pause is None:
                return finish(outcome)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._given_up.wait(), pause)
                return finish(outcome)
