"""`POST /decompress`: a bitstream in, the clean photo out."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import APIRouter, Header, Query, Request, Response

from service.codec.bitstream import MEDIA_TYPE, Bitstream
from service.codec.shipped import latent_size, padded_pixels
from service.engine import Photo
from service.errors import (
    CORRUPT_BITSTREAM,
    EXCHANGE,
    MALFORMED,
    NOT_A_BITSTREAM,
    NOT_ACCEPTABLE,
    UNSUPPORTED_VERSION,
    Problem,
    documented,
)
from service.exchange import exchange
from service.imaging import OutputFormat, check_size, write_photo
from service.openapi import BINARY, HEADERS, body_schema
from service.routes.accept import choose_format
from service.routes.compress import degradation_header
from service.state import ServiceDependency

router = APIRouter()


@router.post(
    "/decompress",
    response_class=Response,
    responses={
        200: {
            "content": {output.media_type: {"schema": BINARY} for output in OutputFormat},
            "description": "The clean photo.",
            "headers": HEADERS,
        },
        **documented(*EXCHANGE, NOT_ACCEPTABLE, NOT_A_BITSTREAM, CORRUPT_BITSTREAM, UNSUPPORTED_VERSION),
    },
    openapi_extra=body_schema(MEDIA_TYPE, "A bitstream of POST /compress."),
)
async def decompress(
    request: Request,
    service: ServiceDependency,
    quality: Annotated[
        int | None, Query(ge=1, le=100, description="Only for image/jpeg, image/webp, image/avif.")
    ] = None,
    accept: Annotated[
        list[str] | None, Header(include_in_schema=False)  # OpenAPI tells it by the media types of the answer
    ] = None,
) -> Response:
    """Restore the clean photo, at exactly the size it was uploaded with."""

    def choose(side: int = 1) -> OutputFormat:
        output = choose_format(", ".join(accept or ()), side)  # several lines are one list
        if quality is not None and output.default_quality is None:
            raise Problem(MALFORMED, f"quality: expected only with a lossy format, got it with {output.media_type}")
        return output

    choose()  # what is wrong whatever the photo's size
    async with exchange(request, service, "decompress") as call:
        data = await call.body()
        stream = Bitstream.from_bytes(data)
        check_size(stream.height, stream.width, service.settings.max_pixels)
        output = choose(max(stream.height, stream.width))
        name = call.ready.engine.model_of(stream).entry.name
        key = ("decompress", name, latent_size(stream.height, stream.width))
        pixels = padded_pixels(stream.height, stream.width)
        photo = cast(Photo, await call.submit(stream, key, pixels=pixels, bytes=len(data) + 3 * stream.pixels))
        body = await call.in_thread("image_encode", lambda: write_photo(photo, output, quality))
        call.hold(body)
    metrics = service.metrics
    metrics.pixels.labels("decompress", name).inc(stream.pixels)
    metrics.bitstream_bytes.labels("decompress", name).inc(len(data))
    metrics.image_bytes.labels("decompress", name).inc(len(body))
    headers = {
        "Limpid-Rate": str(stream.rate),
        "Limpid-Model": name,
        "Limpid-Degradation": degradation_header(stream),
        "Server-Timing": call.server_timing(),
        "Vary": "Accept",
    }
    return Response(body, media_type=output.media_type, headers=headers)
