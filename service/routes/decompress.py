"""`POST /decompress`: a bitstream in, the clean photo out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from service.codec.bitstream import MEDIA_TYPE, Bitstream
from service.errors import MALFORMED, TOO_MANY_PIXELS, Problem
from service.imaging import OutputFormat, write_photo
from service.routes.compress import degradation_header
from service.routes.exchange import Stopwatch, body_schema, choose_format, read_body
from service.state import ServiceDependency

router = APIRouter()


@router.post(
    "/decompress",
    response_class=Response,
    responses={200: {"content": {output.media_type: {} for output in OutputFormat}, "description": "The clean photo."}},
    openapi_extra=body_schema(MEDIA_TYPE, "A bitstream of POST /compress."),
)
async def decompress(
    request: Request,
    service: ServiceDependency,
    quality: Annotated[
        int | None, Query(ge=1, le=100, description="Only for image/jpeg, image/webp, image/avif.")
    ] = None,
    accept: Annotated[
        str | None, Header(description="image/png (default), image/jpeg, image/webp or image/avif.")
    ] = None,
) -> Response:
    """Restore the clean photo, at exactly the size it was uploaded with."""
    ready = service.require()
    output = choose_format(accept)
    if quality is not None and output.default_quality is None:
        raise Problem(MALFORMED, f"quality: expected only with a lossy format, got it with {output.media_type}")
    data = await read_body(request)
    stream = Bitstream.from_bytes(data)
    limit = service.settings.max_pixels
    if stream.pixels > limit:
        raise Problem(TOO_MANY_PIXELS, f"expected at most {limit} pixels, got {stream.width}x{stream.height}")
    name = ready.engine.model_of(stream).entry.name
    watch = Stopwatch("decompress", service.metrics)
    done = await ready.decompress.submit(stream)
    photo, times = done.result
    watch.add_engine(done.queued, times)
    body = await watch.in_thread("image_encode", lambda: write_photo(photo, output, quality))
    metrics = service.metrics
    metrics.pixels.labels("decompress", name).inc(stream.pixels)
    metrics.bitstream_bytes.labels("decompress", name).inc(len(data))
    headers = {
        "Limpid-Rate": str(stream.rate),
        "Limpid-Model": name,
        "Limpid-Degradation": degradation_header(stream),
        "Server-Timing": watch.header(),
        "Vary": "Accept",
    }
    return Response(body, media_type=output.media_type, headers=headers)
