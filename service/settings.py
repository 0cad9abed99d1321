"""Every setting of the service, read from the environment with the prefix `LIMPID_`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.codec.config import MOST_EFFORT

DEFAULT_STORE = Path(__file__).parents[1] / "model_store"
DAY = 86_400
"""Seconds; no request and no drain takes longer."""


class Settings(BaseSettings):
    """Settings; a wrong value is named in the error at start-up.

    Attributes:
        store: folder of the model store.
        device: `auto` takes a GPU when there is one; else a torch device such as `cpu` or `cuda:1`.
        precision: of the float transforms; `auto` takes bfloat16 where the hardware multiplies it, else float32.
        threads: CPU threads of the device step, and image files read or written at a time; 0 takes torch's default.
        max_pixels: largest photo accepted by either call.
        max_body_bytes: largest request body.
        max_effort: most rounds of refinement that a request may ask for.
        max_batch_items, max_batch_pixels: of one run on the device; a single photo may exceed the pixels.
        max_batch_wait_ms: milliseconds that a batch that is not full waits on purpose for company.
        max_queue_items: most requests that are admitted at a time.
        max_queue_bytes: most bytes of their bodies and answers, and most of decoded photos that wait.
        request_timeout_s: seconds from a request's admission to its answer, after which it gets 504.
        body_timeout_s: seconds in which a body must have arrived, after which it gets 408, and which a client may take
            for its answer, besides a second for every 32 kB, before it is cut off.
        drain_grace_s: seconds that admitted requests have to finish after SIGTERM.
        api_keys: comma-separated; where there are any, a request needs one as `Authorization: Bearer` or `X-API-Key`.
        cors_origins: comma-separated origins whose pages may call the service; none by default.
        otlp_endpoint: where OpenTelemetry traces go, over OTLP/HTTP; needs the extra `limpid[otel]`.
        demo_page: whether `/` shows the page to drop a photo on.
        host, port: where `serve` listens.
        log_level, log_format: of the service's log on standard error.
    """

    model_config = SettingsConfigDict(env_prefix="LIMPID_", extra="forbid", frozen=True)

    store: Path = DEFAULT_STORE
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = Field(0, ge=0, le=1024)
    max_pixels: int = Field(50_000_000, ge=1)
    max_body_bytes: int = Field(256 * 2**20, ge=1024)
    max_effort: int = Field(MOST_EFFORT, ge=0, le=MOST_EFFORT)
    max_batch_items: int = Field(16, ge=1)
    max_batch_pixels: int = Field(16_000_000, ge=1)
    max_batch_wait_ms: float = Field(0, ge=0, le=10_000)
    max_queue_items: int = Field(64, ge=1)
    max_queue_bytes: int = Field(2**30, ge=1024)
    request_timeout_s: float = Field(60, gt=0, le=DAY)
    body_timeout_s: float = Field(30, gt=0, le=DAY)
    drain_grace_s: float = Field(30, ge=0, le=DAY)
    api_keys: Annotated[list[SecretStr], NoDecode] = []
    cors_origins: Annotated[list[str], NoDecode] = []
    otlp_endpoint: str | None = None
    demo_page: bool = True
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "text"] = "json"

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if value and not parts:  # as keys these would leave the service open
            raise ValueError("expected something between the commas, or nothing at all")
        return parts

    @field_validator("api_keys")
    @classmethod
    def _can_be_sent(cls, keys: list[SecretStr]) -> list[SecretStr]:
        if not all(re.fullmatch("[!-~]+", key.get_secret_value()) for key in keys):
            raise ValueError("expected keys of visible ASCII, which a header can carry")
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
                raise ValueError(f"expected origins such as https://example.com, without a path, or *; got {origin}")
            if origin != origin.lower() or re.search(r"^(http:.*:80|https:.*:443)$", origin):
                raise ValueError(f"expected origins as browsers say them: small letters, no usual port; got {origin}")
        return origins


def service_settings(**chosen: object) -> Settings:
    """Of a service that starts: `Settings`, with a look at names that are nearly one of its variables.

    Raises:
        ValueError: a variable looks like a setting that is not given, such as the client's `LIMPID_API_KEY`.
    """
    if missed := near_misses(os.environ):
        said = (f"{given} is no setting of the service; is {meant} meant?" for given, meant in missed)
        raise ValueError("; ".join(said))
    return Settings(**chosen)  # type: ignore[arg-type]


def near_misses(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Variables that look like a setting which is not given, such as `LIMPID_API_KEY`, each with that setting.

    An orchestrator may add others with the prefix, of which nothing is said.
    """
    settings = {f"LIMPID_{name}".upper() for name in Settings.model_fields}
    given = sorted(name for name in environment if name.startswith("LIMPID_") and name not in settings)
    unset = [name for name in settings if not environment.get(name)]
    found = [(name, get_close_matches(name, unset, 1, 0.9)) for name in given]
    return [(name, meant[0]) for name, meant in found if meant]
