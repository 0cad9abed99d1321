"""Every setting of the service, read from the environment with the prefix `LIMPID_`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_STORE = Path(__file__).parents[1] / "model_store"


class Settings(BaseSettings):
    """Settings; a wrong value is named in the error at start-up.

    Attributes:
        store: folder of the model store.
        device: `auto` takes a GPU when there is one; else a torch device such as `cpu` or `cuda:1`.
        precision: of the float transforms; `auto` takes bfloat16 where the hardware multiplies it, else float32.
        threads: CPU threads of the device step; 0 leaves torch's default.
        max_pixels: largest photo accepted by either call.
        max_body_bytes: largest request body.
        max_queue_items: most requests of one operation that may wait for the device.
        host, port: where `serve` listens.
        log_level: of the service's log.
    """

    model_config = SettingsConfigDict(env_prefix="LIMPID_", extra="forbid", frozen=True)

    store: Path = DEFAULT_STORE
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = Field(0, ge=0, le=1024)
    max_pixels: int = Field(50_000_000, ge=1)
    max_body_bytes: int = Field(256 * 2**20, ge=1024)
    max_queue_items: int = Field(64, ge=1)
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
