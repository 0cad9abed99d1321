"""`POST /compress`: a photo in, a bitstream out."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import APIRouter, Query, Request, Response

from service.budget import MOST_BPP, RateSearch, budget_bytes
from service.codec.bitstream import MEDIA_TYPE, Bitstream
from service.codec.config import MOST_EFFORT, RATE_POINTS
from service.codec.shipped import latent_size, padded_pixels
from service.engine import EncodeJob
from service.errors import BUDGET, CORRUPT_IMAGE, EXCHANGE, MALFORMED, NOT_AN_IMAGE, Problem, documented
from service.exchange import Exchange, exchange
from service.imaging import read_photo
from service.openapi import BINARY, BPP_HEADER, HEADERS, body_schema
from service.state import ServiceDependency

router = APIRouter()

UNKNOWN = "unknown"
"""The degradation of a photo on which the model has no opinion."""

LOOK = 4
"""How many compressions without it one look at refined latents takes as long as, about; N rounds take N + 1 looks."""


@router.post(
    "/compress",
    response_class=Response,
    responses={
        200: {
            "content": {MEDIA_TYPE: {"schema": BINARY}},
            "description": "The bitstream.",
            "headers": {**HEADERS, **BPP_HEADER},
        },
        **documented(*EXCHANGE, NOT_AN_IMAGE, CORRUPT_IMAGE, BUDGET),
    },
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
    target_bpp: Annotated[float | None, Query(gt=0, le=MOST_BPP, description="The same in bits per pixel.")] = None,
    model: Annotated[str | None, Query(max_length=64, description="Name of a model, see /variants.")] = None,
    effort: Annotated[
        int, Query(ge=0, le=MOST_EFFORT, description="Rounds of refinement: time for a better picture per bit.")
    ] = 0,
) -> Response:
    """Compress a photo, degraded or clean. The bitstream decodes to the clean photo."""
    if sum(option is not None for option in (rate, max_bytes, target_bpp)) > 1:
        raise Problem(MALFORMED, "expected at most one of rate, max_bytes and target_bpp")
    if effort > service.settings.max_effort:
        raise Problem(MALFORMED, f"expected an effort of at most {service.settings.max_effort} here, got {effort}")
    async with exchange(request, service, "compress") as call:
        name = call.ready.engine.model(model).entry.name
        data = await call.body()
        photo = await call.in_thread("image_decode", lambda: read_photo(data, service.settings.max_pixels))
        pixels = photo.shape[0] * photo.shape[1]
        search = RateSearch[Bitstream](rate, budget_bytes(max_bytes, target_bpp, pixels))
        while wanted := search.wanted:
            stream = await _encode(call, EncodeJob(photo, wanted, name, effort), search.begun)
            search.add(wanted, stream, len(stream.to_bytes()))
        stream = search.best()
        body = stream.to_bytes()
        call.hold(body)
    bpp = 8 * len(body) / pixels
    metrics = service.metrics
    metrics.pixels.labels("compress", name).inc(pixels)
    metrics.bitstream_bytes.labels("compress", name).inc(len(body))
    metrics.image_bytes.labels("compress", name).inc(len(data))
    metrics.efforts.labels(str(effort)).inc()
    metrics.bits_per_pixel.labels(name, str(stream.rate)).observe(bpp)
    for label in [found.kind.label for found in stream.degradations] or [UNKNOWN]:
        metrics.degradations.labels(label).inc()
    headers = {
        "Limpid-Rate": str(stream.rate),
        "Limpid-Bpp": f"{bpp:.4f}",
        "Limpid-Model": name,
        "Limpid-Degradation": degradation_header(stream),
        "Server-Timing": call.server_timing(),
    }
    return Response(body, media_type=MEDIA_TYPE, headers=headers)


def degradation_header(stream: Bitstream) -> str:
    """`noise;0.82, haze;0.31`, or `unknown` where the model reports nothing."""
    return ", ".join(f"{d.kind.label};{d.strength:.2f}" for d in stream.degradations) or UNKNOWN


def pixels_of(job: EncodeJob, refined: bool) -> int:
    """Those that a photo counts for in a batch and in time; many more where it is refined."""
    looks = job.effort + 1 if refined and job.effort else 0
    return padded_pixels(*job.photo.shape[:2]) * (1 + LOOK * looks)


async def _encode(call: Exchange, job: EncodeJob, begun: bool) -> Bitstream:
    key = ("compress", job.model, (*latent_size(*job.photo.shape[:2]), job.effort))
    pixels = pixels_of(job, refined=True)  # which only its report will tell
    stream = await call.submit(job, key, pixels=pixels, bytes=job.photo.nbytes, begun=begun)
    return cast(Bitstream, stream)
