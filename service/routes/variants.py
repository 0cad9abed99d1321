"""`GET /variants`: the models, their rate points and what was measured of them."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from service.codec.config import RATE_POINTS
from service.engine import Model
from service.errors import BAD_KEY, DRAINING, NOT_READY, documented
from service.state import ServiceDependency
from service.store import Measurement

router = APIRouter()


class Variant(BaseModel):
    """One (model, rate point), with its mean bits per pixel and PSNR in dB per set of photos and degradation."""

    rate: int
    measured: list[Measurement]


class ModelView(BaseModel):
    name: str
    id: str
    size: str
    default: bool
    device: str
    precision: str
    resident_bytes: int
    variants: list[Variant]


class Variants(BaseModel):
    """The models, and the largest `effort` that a request may ask for."""

    models: list[ModelView]
    max_effort: int


@router.get("/variants", responses=documented(BAD_KEY, NOT_READY, DRAINING))
async def variants(service: ServiceDependency) -> Variants:
    """Every model on the device, and how much effort may be asked for."""
    engine = service.require().engine

    def view(model: Model) -> ModelView:
        entry = model.entry
        return ModelView(
            name=entry.name,
            id=entry.model_id.hex(),
            size=entry.size,
            default=entry.name == engine.default.entry.name,
            device=str(engine.device),
            precision=engine.precision,
            resident_bytes=model.resident_bytes,
            variants=[
                Variant(rate=rate, measured=[m for m in entry.measured if m.rate == rate])
                for rate in range(1, RATE_POINTS + 1)
            ],
        )

    models = [view(model) for model in engine.models.values()]
    return Variants(models=models, max_effort=service.settings.max_effort)
