"""The model store: `store.json`, one safetensors file per model, and how a model gets from there to a device.

Every file is checked against its digest before it is used, and every model answers its known-answer test before it is
handed out. Models are added and never altered: a file keeps its name and digest for as long as streams of it exist.
Nothing here encodes or decodes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from service.codec.bitstream import MODEL_ID_BYTES
from service.codec.config import MODEL_NAME, RATE_POINTS
from service.codec.known_answer import CODER_ANSWER, coder_answer, known_answer
from service.codec.shipped import ShippedCodec
from service.files import write_whole

STORE_FILE = "store.json"


class StoreError(ValueError):
    """The store cannot be used as it is: something is missing, altered or does not fit."""


class Measurement(BaseModel):
    """Mean over a set of photos at one rate point: file bytes in bits per pixel, PSNR in dB against the clean photo."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: int = Field(ge=1, le=RATE_POINTS)
    degradation: str
    photos: str
    bpp: float
    psnr: float


class ModelEntry(BaseModel):
    """One model of the store.

    `sha256` is the file's; its first 8 bytes are the model id that bitstreams carry. `known_answer` is what
    `service.codec.known_answer` gives on every device. `training` records how the weights came about.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=f"^{MODEL_NAME}$")
    size: str
    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    known_answer: str = Field(pattern=r"^[0-9a-f]{64}$")
    rate_points: int = RATE_POINTS
    training: dict[str, str | int | float] = {}
    measured: list[Measurement] = []

    @property
    def model_id(self) -> bytes:
        return bytes.fromhex(self.sha256)[:MODEL_ID_BYTES]


class StoreIndex(BaseModel):
    """The content of `store.json`: the models, and the name of the one that is used when a request names none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default: str
    models: list[ModelEntry]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process changes the store meanwhile, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _copy(source: ModelStore, entry: ModelEntry, folder: Path) -> None:
    """Raises:
    StoreError: another file has its name there, or it is altered.
    """
    data, path = (source.folder / entry.file).read_bytes(), folder / entry.file
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise StoreError(f"model {entry.name}: {source.folder / entry.file} has changed meanwhile")
    if not (path.exists() or path.is_symlink()):
        write_whole(path, data)
    elif not path.is_file() or path.read_bytes() != data:
        raise StoreError(f"{path} is there already and holds something else, of no model of the store: move it away")


def _write_index(folder: Path, index: StoreIndex) -> None:
    write_whole(folder / STORE_FILE, index.model_dump_json(indent=2).encode() + b"\n")


class ModelStore:
    """An opened store.

    Args:
        folder: where `store.json` lies.

    Raises:
        StoreError: no store there, or one that contradicts itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / STORE_FILE
        try:
            self.index = StoreIndex.model_validate_json(path.read_bytes())
        except OSError as error:
            raise StoreError(f"expected a model store at {folder}: {error.strerror}: {STORE_FILE}") from error
        except ValidationError as error:
            raise StoreError(f"{path}: {error}") from error
        names = [entry.name for entry in self.index.models]
        ids = {entry.model_id for entry in self.index.models}
        if len(set(names)) < len(names) or len(ids) < len(names):
            raise StoreError(f"{path}: two models share a name or an id: {', '.join(names)}")
        if len({entry.file for entry in self.index.models}) < len(names):
            raise StoreError(f"{path}: two models share a file")
        if self.index.default not in names:
            raise StoreError(f"{path}: the default {self.index.default!r} is not among {', '.join(names)}")

    @classmethod
    def begin(cls, folder: Path, source: ModelStore, name: str) -> ModelStore:
        """A new store with one model of another, its default, in a folder that is empty or not there yet.

        Raises:
            StoreError: the folder holds something, or the source lacks the model or fails its checks.
        """
        entry = source.entry(name)
        left = [path.name for path in folder.iterdir()] if folder.exists() else []
        # What an earlier call left that was ended: its file, whole or not.
        if any(one != entry.file and not (one.startswith(".") and one.endswith(".new")) for one in left):
            raise StoreError(f"expected a model store, or nothing, at {folder}")
        source.load(entry, torch.device("cpu"))
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if (folder / STORE_FILE).exists():
                raise StoreError(f"{folder} has become a model store meanwhile")
            _copy(source, entry, folder)
            _write_index(folder, StoreIndex(default=name, models=[entry]))
        return cls(folder)

    def entry(self, name: str) -> ModelEntry:
        """Raises:
        StoreError: the store has no model of that name.
        """
        for entry in self.index.models:
            if entry.name == name:
                return entry
        held = ", ".join(entry.name for entry in self.index.models)
        raise StoreError(f"expected one of the models {held} of {self.folder}, got {name!r}")

    def add(self, source: ModelStore, name: str) -> None:
        """Copy a model of another store into this one, without making it the default. It is checked on the CPU first.

        Raises:
            StoreError: the source lacks it or fails its checks, or this store has a model of that name, id or file.
        """
        entry = source.entry(name)
        self._refuse_known(entry, self._held())
        source.load(entry, torch.device("cpu"))
        with _alone(self.folder):
            held = self._held()
            self._refuse_known(entry, held)
            _copy(source, entry, self.folder)
            self._write(held.model_copy(update={"models": [*held.models, entry]}))

    def _refuse_known(self, entry: ModelEntry, held: StoreIndex) -> None:
        for known in held.models:
            if known.name == entry.name or known.model_id == entry.model_id:
                raise StoreError(f"{self.folder} has model {known.name} with id {known.model_id.hex()} already")
            if known.file == entry.file:
                raise StoreError(
                    f"{self.folder} keeps model {known.name} in {known.file}, the file name of {entry.name}"
                )

    def set_default(self, name: str) -> None:
        """Make a model the one that is used when a request names none.

        Raises:
            StoreError: the store has no model of that name.
        """
        with _alone(self.folder):
            self.index = self._held()
            self._write(self.index.model_copy(update={"default": self.entry(name).name}))

    def _held(self) -> StoreIndex:
        """What the folder holds now: another may have written since this store was opened."""
        return ModelStore(self.folder).index

    def _write(self, index: StoreIndex) -> None:
        _write_index(self.folder, index)
        self.index = index

    def load(self, entry: ModelEntry, device: torch.device, dtype: torch.dtype = torch.float32) -> ShippedCodec:
        """Read one model, check it, and put it on a device, with the products of its transforms in `dtype`.

        Raises:
            StoreError: the file is missing or altered, holds something else, or fails its known-answer test here.
        """
        path = self.folder / entry.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(f"model {entry.name}: {error.strerror}: {path}") from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry.sha256:
            raise StoreError(f"model {entry.name}: expected SHA-256 {entry.sha256}, {path} has {digest}")
        try:
            tensors = load_tensors(data)  # checks the header, which it does not hand out
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            description = header.get("__metadata__", {}).get("limpid", "")
            codec = ShippedCodec.from_tensors(tensors, description, device, dtype)
        except (SafetensorError, ValueError) as error:
            raise StoreError(f"model {entry.name}: {path}: {error}") from error
        if coder_answer() != CODER_ANSWER:
            raise StoreError(
                "the entropy coder (compressai.ans) writes other bytes than it should, is it of another version? "
                "Bitstreams made here would not decode elsewhere"
            )
        try:
            answer = known_answer(codec)
        except (ValueError, LookupError, RuntimeError) as error:
            raise StoreError(f"model {entry.name}: {path}: the layers of its prior do not fit: {error}") from error
        if answer != entry.known_answer:
            raise StoreError(
                f"model {entry.name}: the exact path gives {answer[:16]}... on {device}, expected "
                f"{entry.known_answer[:16]}...: bitstreams made here would not decode elsewhere"
            )
        return codec
