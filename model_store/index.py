"""A model store as training and evaluation see it: `store.json` and the tensors of one model, as they are.

The service opens stores with `service.store`, which checks digests and known answers; this room imports the codec only.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

STORE = Path(__file__).parent
"""The repository's own."""

INDEX = "store.json"


def read_index(store: Path) -> dict[str, Any]:
    """`store.json` as it is; an empty one where there is none yet."""
    path = store / INDEX
    index: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"models": []}
    return index


def write_index(store: Path, index: dict[str, Any]) -> None:
    replace_file(store / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


@dataclass(frozen=True)
class StoredModel:
    """One model of a store: its entry, what `ship` made of it, and the JSON description of its shape."""

    entry: dict[str, Any]
    tensors: dict[str, Tensor]
    description: str


def read_model(store: Path, name: str | None = None) -> StoredModel:
    """A model by name, None for the default.

    Raises:
        ValueError: the store has none of that name.
    """
    index = read_index(store)
    known = {entry["name"]: entry for entry in index["models"]}
    name = name or index.get("default")
    if name not in known:
        raise ValueError(f"expected one of {', '.join(known)} in {store}, got {name}")
    path = store / known[name]["file"]
    with safe_open(path, framework="pt") as opened:
        description = opened.metadata()["limpid"]
    return StoredModel(known[name], load_file(path), description)
