"""`POST /compress`: a photo in, a bitstream out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from service.codec.bitstream import MEDIA_TYPE, Bitstream
from service.codec.config import RATE_POINTS
from service.engine import EncodeJob, Photo
from service.errors import BUDGET, MALFORMED, Problem
from service.imaging import read_photo
from service.routes.exchange import Stopwatch, body_schema, read_body
from service.state import Ready, ServiceDependency

router = APIRouter()

DEFAULT_RATE = 4


@router.post(
    "/compress",
    response_class=Response,
    responses={200: {"content": {MEDIA_TYPE: {}}, "description": "The bitstream."}},
    openapi_extra=body_schema("image/*", "A photo: JPEG, PNG, WebP, AVIF, TIFF or BMP."),
)
async def compress(
    request: Request,
    service: ServiceDependency,
    rate: Annotated[
        int | None, Query(ge=1, le=RATE_POINTS, description="Rate point, 4 unless a budget is given.")
    ] = None,
    max_bytes: Annotated[
        int | None, Query(ge=1, description="Best rate point whose bitstream has at most so many bytes.")
    ] = None,
    target_bpp: Annotated[float | None, Query(gt=0, le=64, description="The same in bits per pixel.")] = None,
    model: Annotated[str | None, Query(max_length=64, description="Name of a model, see /variants.")] = None,
) -> Response:
    """Compress a photo, degraded or clean. The bitstream decodes to the clean photo."""
    ready = service.require()
    if sum(option is not None for option in (rate, max_bytes, target_bpp)) > 1:
        raise Problem(MALFORMED, "expected at most one of rate, max_bytes and target_bpp")
    name = ready.engine.model(model).entry.name
    watch = Stopwatch("compress", service.metrics)
    data = await read_body(request)
    photo = await watch.in_thread("image_decode", lambda: read_photo(data, service.settings.max_pixels))
    pixels = photo.shape[0] * photo.shape[1]
    if max_bytes is None and target_bpp is None:
        stream = await _encode(ready, EncodeJob(photo, rate or DEFAULT_RATE, name), watch)
        body = stream.to_bytes()
    else:
        budget = max_bytes if max_bytes is not None else int((target_bpp or 0) * pixels / 8)
        stream, body = await _within(budget, ready, photo, name, watch)
    bpp = 8 * len(body) / pixels
    metrics = service.metrics
    metrics.pixels.labels("compress", name).inc(pixels)
    metrics.bitstream_bytes.labels("compress", name).inc(len(body))
    metrics.bits_per_pixel.labels(name, str(stream.rate)).observe(bpp)
    for found in stream.degradations:
        metrics.degradations.labels(found.kind.label).inc()
    headers = {
        "Limpid-Rate": str(stream.rate),
        "Limpid-Bpp": f"{bpp:.4f}",
        "Limpid-Model": name,
        "Limpid-Degradation": degradation_header(stream),
        "Server-Timing": watch.header(),
    }
    return Response(body, media_type=MEDIA_TYPE, headers=headers)


def degradation_header(stream: Bitstream) -> str:
    """`noise;0.82, haze;0.31`, or `unknown` where the model reports nothing."""
    return ", ".join(f"{d.kind.label};{d.strength:.2f}" for d in stream.degradations) or "unknown"


async def _encode(ready: Ready, job: EncodeJob, watch: Stopwatch) -> Bitstream:
    done = await ready.compress.submit(job)
    stream, times = done.result
    watch.add_engine(done.queued, times)
    return stream


async def _within(budget: int, ready: Ready, photo: Photo, model: str, watch: Stopwatch) -> tuple[Bitstream, bytes]:
    """The best rate point that fits `budget` bytes, by bisection: sizes grow with the rate point.

    Raises:
        Problem: 422 with the smallest size, when even rate point 1 does not fit.
    """
    low, high = 1, RATE_POINTS
    best: tuple[Bitstream, bytes] | None = None
    smallest = 0
    while low <= high:
        middle = (low + high) // 2
        stream = await _encode(ready, EncodeJob(photo, middle, model), watch)
        body = stream.to_bytes()
        if len(body) <= budget:
            best, low = (stream, body), middle + 1
        else:
            smallest, high = len(body), middle - 1
    if best is None:
        raise Problem(BUDGET, f"expected a budget of at least {smallest} bytes for this photo, got {budget}")
    return best
