"""Frames of a camera over HTTP: the parts of an MJPEG stream, or snapshots. Knows nothing of Limpid."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator
from email.message import Message

import httpx

log = logging.getLogger("gateway")

LARGEST_FRAME = 2**26
"""Bytes; a camera that sends more without a boundary is asked anew."""


async def camera_frames(url: str, every: float | None) -> AsyncIterator[bytes]:
    """Frames of a camera without end: parts of an MJPEG stream, or snapshots, at most one in `every` seconds.

    None takes each frame of a stream, and a snapshot a second.

    Whatever goes wrong at the camera is logged, and the camera asked again after a second.
    """
    async with httpx.AsyncClient(timeout=httpx.Timeout(10)) as http:
        while True:
            try:
                async with http.stream("GET", url) as answer:
                    answer.raise_for_status()
                    kind = answer.headers.get("content-type", "")
                    if kind.lower().startswith("multipart/"):
                        async for frame in thinned(parts(answer.aiter_bytes(), boundary(kind)), every or 0):
                            yield frame
                        log.warning("the camera ended its stream")
                        await asyncio.sleep(1)
                    else:
                        yield await snapshot(answer.aiter_bytes())
                        await asyncio.sleep(every or 1)
            except httpx.HTTPStatusError as error:  # whose text has the URL, keys and all
                log.warning("camera: it answers %d", error.response.status_code)
                await asyncio.sleep(1)
            except httpx.HTTPError as error:
                log.warning("camera: %s: %s", type(error).__name__, error)
                await asyncio.sleep(1)


async def thinned(frames: AsyncIterator[bytes], every: float) -> AsyncIterator[bytes]:
    """Of frames that come by themselves, the first and then each that comes `every` seconds or more after the last."""
    due = 0.0
    async for frame in frames:
        if (now := time.monotonic()) >= due:
            due = now + every
            yield frame


async def snapshot(chunks: AsyncIterator[bytes]) -> bytes:
    """A body that is one frame.

    Raises:
        httpx.RemoteProtocolError: it is larger than any frame; a video, say, that would never end.
    """
    frame = bytearray()
    async for chunk in chunks:
        frame += chunk
        if len(frame) > LARGEST_FRAME:
            raise httpx.RemoteProtocolError(f"expected a photo, got more than {LARGEST_FRAME} bytes in one answer")
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
