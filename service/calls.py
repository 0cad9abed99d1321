"""The calls of a client, without any input or output: what to send, when to send it again, what an answer means."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import httpx

Body = bytes | Path | Callable[[], Iterator[bytes]]
"""An upload: bytes, a file that is streamed from disk, or a function that gives chunks anew for each attempt."""

T = TypeVar("T")

CHUNK = 1 << 16
RETRIED = frozenset({408, 429, 502, 503})
DAY = 86_400.0
PROBLEM = "urn:limpid:problem:"


class LimpidError(Exception):
    """The call did not succeed.

    Attributes:
        kind: the last part of the problem's `type` (RFC 9457), `unreachable` where no answer came.
        status: HTTP status, None where no answer came.
        detail: what was expected and what came, in the service's words.
        request_id: to find the request in the service's log.
        retry_after: seconds that the last answer asked to wait before the next attempt.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        status: int | None = None,
        request_id: str | None = None,
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.status, self.request_id = kind, detail, status, request_id
        self.retry_after = retry_after


class RequestRefused(LimpidError):
    """4xx of Limpid, but 408 and 429: this request will never succeed as it is."""


class Unauthorized(RequestRefused):
    """401: the key is missing or wrong."""


class BudgetUnmeetable(RequestRefused):
    """422: no rate point fits the budget; `detail` names the smallest size."""


class ServiceBusy(LimpidError):
    """429 until the attempts or the deadline were used up."""


class ServiceUnavailable(LimpidError):
    """408, 502, 503 or no answer until the attempts or the deadline were used up; at once for another 5xx, a redirect
    and what none of Limpid's answers."""


class DeadlineExceeded(LimpidError):
    """504: the service found no time for it before its deadline."""


@dataclass(frozen=True)
class Compressed:
    """A bitstream, its rate point, bits per pixel and model, what was found wrong, and milliseconds per stage."""

    bitstream: bytes
    rate: int
    bpp: float
    model: str
    degradations: dict[str, float]
    timing: dict[str, float]
    request_id: str


@dataclass(frozen=True)
class Restored:
    """An encoded image with its media type, and the rate point and model of the bitstream it came from."""

    image: bytes
    media_type: str
    rate: int
    model: str
    degradations: dict[str, float]
    timing: dict[str, float]
    request_id: str


@dataclass(frozen=True)
class Policy:
    """How long and how often.

    Attributes:
        deadline: seconds for a call, over all attempts; the service hears what is left of it.
        attempts: at most so many.
        backoff, backoff_max: seconds before the second attempt, doubled for each further one; jittered by half.
    """

    deadline: float = 60.0
    attempts: int = 8
    backoff: float = 0.2
    backoff_max: float = 10.0


@dataclass
class Call:
    """One call on its way: what to send, how long is left, what to do after each attempt. Does no input or output."""

    method: str
    path: str
    policy: Policy
    body: Body | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    attempt: int = 0

    def __post_init__(self) -> None:
        if self.body is not None and not (isinstance(self.body, bytes | Path) or callable(self.body)):
            raise TypeError(f"expected bytes, a Path or a function that gives chunks, got {type(self.body).__name__}")
        self._ends = self.clock() + self.policy.deadline

    def left(self) -> float:
        return max(0.001, self._ends - self.clock())

    def arguments(self) -> dict[str, Any]:
        self.attempt += 1
        # A little less than is left, so that the service's 504 arrives before the wait for it ends.
        left = self.left()
        headers = {**self.headers, "Limpid-Timeout": f"{left - min(1.0, left / 10):.3f}"}
        if isinstance(self.body, Path):  # else it would go out chunked, its length unsaid
            headers["Content-Length"] = str(self.body.stat().st_size)
        elif isinstance(self.body, bytes):
            headers["Content-Length"] = str(len(self.body))
        return {"params": dict(self.params), "headers": headers, "timeout": left}

    def too_late(self) -> httpx.TimeoutException:
        return httpx.TimeoutException(f"not done within {self.policy.deadline:g} seconds")

    def pause_after(self, outcome: httpx.Response | httpx.RequestError) -> float | None:
        """Seconds to wait before the next attempt; None where there is none, and `outcome` is the end."""
        if isinstance(outcome, httpx.Response) and outcome.status_code not in RETRIED:
            return None
        backoff = min(self.policy.backoff_max, self.policy.backoff * 2.0 ** min(self.attempt - 1, 64))
        pause = backoff * (0.5 + 0.5 * random.random())
        if isinstance(outcome, httpx.Response):
            asked = retry_after(outcome.headers)
            pause = max(pause, asked * random.uniform(1, 1.5))  # or all that were refused return at once
        least = min(1.0, self.policy.deadline / 10)  # or a late attempt's end would hide what was answered before
        if self.attempt >= self.policy.attempts or self.clock() + pause + least > self._ends:
            return None
        return pause


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that `Retry-After` asks for, a number or a date (RFC 9110, section 10.2.3), at most `DAY`; 0 for anything
    else. A date is seen from the answer's own: clocks here may be wrong."""
    value = headers.get("retry-after", "").strip()
    if value.isdecimal():
        return min(DAY, float(value))
    if not (then := _timestamp(value)):
        return 0.0
    return min(DAY, max(0.0, then - (_timestamp(headers.get("date", "")) or time.time())))


def _timestamp(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None


def chunks(body: Body) -> Iterator[bytes]:
    """The bytes of an upload, in pieces."""
    if isinstance(body, bytes):
        yield from (body[start : start + CHUNK] for start in range(0, len(body), CHUNK))
    elif isinstance(body, Path):
        with body.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    else:
        yield from body()


def _in_short(answer: httpx.Response) -> str:
    """In a line, of an answer that is none of Limpid's, such as a redirect from http to https, or a proxy's page."""
    place, words = answer.headers.get("location"), " ".join(answer.text.split())[:200]
    return f"status {answer.status_code}" + (f", to {place}" if place else "") + (f": {words}" if words else "")


def finish(outcome: httpx.Response | httpx.RequestError) -> httpx.Response:
    """The response, if it is a good one.

    Raises:
        LimpidError: it is not, or there is none.
    """
    if isinstance(outcome, httpx.RequestError):
        raise ServiceUnavailable("unreachable", f"{type(outcome).__name__}: {outcome}") from outcome
    if outcome.is_success:
        return outcome
    try:
        problem = outcome.json()
        name, detail = str(problem["type"]), str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        name, detail = "", _in_short(outcome)
    # A proxy answers as it likes, with problems of its own too.
    kind = name.removeprefix(PROBLEM) if name.startswith(PROBLEM) else "unexpected-answer"
    status = outcome.status_code
    types: dict[int, type[LimpidError]] = {401: Unauthorized, 429: ServiceBusy, 504: DeadlineExceeded}
    # Only what Limpid itself refuses will never succeed: not a slow link, a redirect or a proxy without its backend.
    refused = 400 <= status < 500 and status != 408 and kind != "unexpected-answer"
    error = types.get(status, RequestRefused if refused else ServiceUnavailable)
    if kind == "unmeetable-budget":
        error = BudgetUnmeetable
    headers = outcome.headers
    raise error(kind, detail, status, headers.get("x-request-id"), retry_after(headers))


def compress_call(
    body: Body,
    rate: int | None,
    max_bytes: int | None,
    target_bpp: float | None,
    model: str | None,
    effort: int | None,
    policy: Policy,
) -> Call:
    """`POST /compress` at a rate point from 1 to 8 or within a budget, of which at most one is given."""
    options = {"rate": rate, "max_bytes": max_bytes, "target_bpp": target_bpp, "model": model, "effort": effort}
    params = {name: str(value) for name, value in options.items() if value is not None}
    return Call("POST", "/compress", policy, body, params, {"Content-Type": "application/octet-stream"})


def decompress_call(body: Body, media_type: str, quality: int | None, policy: Policy) -> Call:
    """`POST /decompress` for an image of a media type, `quality` 1 to 100 for the lossy ones."""
    headers = {"Content-Type": "application/vnd.limpid", "Accept": media_type}
    return Call("POST", "/decompress", policy, body, {} if quality is None else {"quality": str(quality)}, headers)


def _of_limpid(read: Callable[[httpx.Response], T]) -> Callable[[httpx.Response], T]:
    """`read`, which raises ServiceUnavailable for an answer that is another service's, or a proxy's page."""

    @wraps(read)
    def checked(response: httpx.Response) -> T:
        try:
            return read(response)
        except (ValueError, KeyError, TypeError):
            raise ServiceUnavailable("unexpected-answer", _in_short(response), response.status_code) from None

    return checked


@_of_limpid
def compressed(response: httpx.Response) -> Compressed:
    """What `/compress` answered. Raises `ServiceUnavailable` where it was none of Limpid's, as the next two do."""
    headers = response.headers
    return Compressed(response.content, bpp=float(headers["limpid-bpp"]), **_common(headers))


@_of_limpid
def restored(response: httpx.Response) -> Restored:
    """What `/decompress` answered."""
    return Restored(response.content, response.headers["content-type"], **_common(response.headers))


@_of_limpid
def variants_of(response: httpx.Response) -> dict[str, Any]:
    """What `/variants` answered."""
    answer: dict[str, Any] = response.json()
    answer["models"]
    return answer


def _common(headers: httpx.Headers) -> dict[str, Any]:
    return {
        "rate": int(headers["limpid-rate"]),
        "model": headers["limpid-model"],
        "degradations": _weighted(headers.get("limpid-degradation", ""), ""),
        "timing": _weighted(headers.get("server-timing", ""), "dur="),
        "request_id": headers.get("x-request-id", ""),
    }


def _weighted(header: str, prefix: str) -> dict[str, float]:
    """`noise;0.82, haze;0.31` or `queue;dur=1.5` as a dictionary; words without a number are left out."""
    found: dict[str, float] = {}
    for part in header.split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        for parameter in parameters:
            with suppress(ValueError):  # such as a description that a proxy added
                found[name] = float(parameter.removeprefix(prefix))
    return found


def base_url(url: str) -> httpx.URL:
    """As curl reads it: http where nothing else is said.

    Raises:
        ValueError: it is no URL of HTTP.
    """
    try:
        base = httpx.URL(url if "://" in url else f"http://{url}")
    except httpx.InvalidURL as error:
        raise ValueError(f"expected a URL, got {url!r}: {error}") from None
    if base.scheme not in ("http", "https") or not base.host:
        raise ValueError(f"expected a URL, http:// or https:// and a host, got {url!r}")
    return base


def key_header(api_key: str | None, url: httpx.URL) -> dict[str, str]:
    """The key, beside a name and a password for a proxy that the URL may have, which go as `Authorization`.

    Raises:
        ValueError: no header can carry the key, which is not told.
    """
    key = (api_key or "").strip()  # a file's last line ends in a newline
    if not all("!" <= letter <= "~" for letter in key):
        raise ValueError("expected an API key of visible ASCII characters")
    if not key:
        return {}
    return {"X-API-Key": key} if url.userinfo else {"Authorization": f"Bearer {key}"}
