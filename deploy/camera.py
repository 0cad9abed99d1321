"""Frames of a camera over HTTP: the parts of an MJPEG stream, or snapshots. Knows nothing of Limpid."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from email.message import Message

import httpx

log = logging.getLogger("gateway")

LARGEST_FRAME = 2**26
"""Bytes; a camera that sends more without a boundary is asked anew."""

PATIENCE, QUIET = 10.0, 600.0
"""Seconds for an answer to begin and a snapshot to go on, and that a stream may be silent: some film on motion only."""

_JPEG = b"\xff\xd8"

_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A stream whose camera is gone is given up after so many seconds of silence, and asked so often."""


def _transport() -> httpx.AsyncHTTPTransport:
    """Straight to the camera, whatever proxies the environment names."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    options += [(socket.IPPROTO_TCP, getattr(socket, name), n) for name, n in _ALIVE.items() if hasattr(socket, name)]
    return httpx.AsyncHTTPTransport(socket_options=options)


async def camera_frames(url: str, every: float | None) -> AsyncIterator[bytes]:
    """Frames of a camera without end: parts of an MJPEG stream, or snapshots, at most one in `every` seconds.

    None takes each frame of a stream, and a snapshot a second.

    Whatever goes wrong at the camera is logged, and the camera asked again after a second.
    """
    async with httpx.AsyncClient(timeout=httpx.Timeout(PATIENCE, read=QUIET), transport=_transport()) as http:
        while True:
            try:
                async with asyncio.timeout(PATIENCE):
                    answer = await http.send(http.build_request("GET", url), stream=True)
                async with aclosing(answer):
                    answer.raise_for_status()
                    kind = answer.headers.get("content-type", "").lower()
                    if kind.startswith("multipart/"):
                        between = boundary(answer.headers["content-type"])
                        async for frame in thinned(parts(answer.aiter_bytes(), between), every or 0):
                            yield frame
                        log.warning("the camera ended its stream")
                        await asyncio.sleep(1)
                    else:
                        frame = await snapshot(steady(answer.aiter_bytes()))
                        if kind.startswith(("text/", "application/json")) and not frame.startswith(_JPEG):  # to log in
                            raise httpx.RemoteProtocolError(f"expected a photo, got {kind}")
                        yield frame
                        await asyncio.sleep(every or 1)
            except httpx.HTTPStatusError as error:  # whose text has the URL, keys and all
                log.warning("camera: it answers %d", error.response.status_code)
                await asyncio.sleep(1)
            except (httpx.HTTPError, TimeoutError) as error:
                log.warning("camera: %s: %s", type(error).__name__, str(error) or "it is silent")
                await asyncio.sleep(1)


async def thinned(frames: AsyncIterator[bytes], every: float) -> AsyncIterator[bytes]:
    """Of frames that come by themselves, the first and then each that comes `every` seconds or more after the last."""
    due = 0.0
    async for frame in frames:
        if (now := time.monotonic()) >= due:
            due = now + every
            yield frame


async def steady(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same.

    Raises:
        TimeoutError: one does not come within `PATIENCE`.
    """
    while True:
        async with asyncio.timeout(PATIENCE):
            chunk = await anext(chunks, None)
        if chunk is None:
            return
        yield chunk


async def snapshot(chunks: AsyncIterator[bytes]) -> bytes:
    """A body that is one frame.

    Raises:
        httpx.RemoteProtocolError: it is empty, or larger than any frame; a video, say, that would never end.
    """
    frame = bytearray()
    async for chunk in chunks:
        frame += chunk
        if len(frame) > LARGEST_FRAME:
            raise httpx.RemoteProtocolError(f"expected a photo, got more than {LARGEST_FRAME} bytes in one answer")
    if not frame:
        raise httpx.RemoteProtocolError("expected a photo, got an empty answer")
    return bytes(frame)


def boundary(content_type: str) -> bytes:
    """The line between the parts of a `multipart/x-mixed-replace` body.

    Raises:
        httpx.RemoteProtocolError: the header names none.
    """
    header = Message()
    header["Content-Type"] = content_type
    name = header.get_boundary()
    if not name:
        raise httpx.RemoteProtocolError(f"expected a boundary in {content_type!r}")
    return b"--" + name.removeprefix("--").encode()


async def parts(chunks: AsyncIterator[bytes], between: bytes) -> AsyncIterator[bytes]:
    """The contents of the parts of a multipart body; a part that no boundary follows was cut and is dropped.

    Raises:
        httpx.RemoteProtocolError: a part goes on without end.
    """
    held = b""
    async for chunk in chunks:
        held += chunk
        while part := first_part(held, between):
            content, held = part
            if content:
                yield content
        if len(held) > LARGEST_FRAME:
            raise httpx.RemoteProtocolError(f"no boundary {between!r} within {LARGEST_FRAME} bytes")


_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")  # as ffmpeg, which takes bare line feeds too
_LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,9})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)


def first_part(held: bytes, between: bytes) -> tuple[bytes, bytes] | None:
    """The content of the first whole part and what follows it; None while more has to come.

    A part that tells its length is whole when it is there, whatever bytes it has; another at the next boundary.
    """
    start = held.find(between)
    head = _END_OF_HEAD.search(held, start + len(between)) if start >= 0 else None
    if head is None:
        return None
    if stated := _LENGTH.search(held, start, head.end()):
        end = head.end() + int(stated[1])
        return (held[head.end() : end], held[end:]) if len(held) >= end else None
    end = held.find(between, head.end())
    return (re.sub(rb"\r?\n\Z", b"", held[head.end() : end]), held[end:]) if end >= 0 else None
