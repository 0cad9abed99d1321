"""`python -m model_store.training.export`: put the EMA weights of a run into a store as a new model.

Old models stay, so that old bitstreams stay readable; the new one becomes the default unless told otherwise.
For the repository's own store, `states/SIZE.safetensors` beside this file keeps the weights from which training can go
on (`--start-from`).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from model_store.index import INDEX, STORE, read_index, replace_file, write_index
from model_store.training.frequencies import COUNTED_BATCHES, with_counted_tables
from model_store.training.report import REPORT_FILE, read_report, record_of
from model_store.training.weights import config_of, keep_weights
from service.codec.config import MODEL_NAME
from service.codec.known_answer import known_answer
from service.codec.model import TrainableCodec, ship
from service.codec.shipped import ShippedCodec

STATES = Path(__file__).parent / "states"


def export(
    checkpoint: Path,
    name: str,
    store: Path,
    make_default: bool = True,
    photos: Path | None = None,
    batches: int = COUNTED_BATCHES,
) -> dict[str, object]:
    """Write `<name>.safetensors` and its entry in `store.json`. Returns the entry.

    A report head that `model_store.training.report` left beside the checkpoint becomes part of the model. With a folder
    of photographs, the frequencies of y and z are counted on `batches` of four crops of them; without, they are
    Gaussian and logistic.

    Raises:
        ValueError: the store already has another model of that name, or the head beside the checkpoint is another's.
    """
    check_new_name(store, name)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = TrainableCodec(config_of(state["size"], state["ema"]))
    model.load_state_dict(state["ema"])
    report = checkpoint.with_name(REPORT_FILE)
    of_report = record_of(report, state["ema"]) if report.exists() else {}
    tensors, description = ship(model, read_report(report, model.config) if report.exists() else None)
    if photos:
        tensors = with_counted_tables(tensors, description, photos, batches)
    training = {
        "date": datetime.date.today().isoformat(),
        "steps": state["step"],
        "hours": round(state["seconds"] / 3600, 2),
        **state["record"],
        **of_report,
        "batches_counted": batches if photos else 0,
    }
    return enter(store, name, state["size"], tensors, description, training, make_default)


def check_new_name(store: Path, name: str) -> None:
    """Raises:
    ValueError: the store already has a model of that name, or the service would take no store with one.
    """
    if not re.fullmatch(MODEL_NAME, name):
        raise ValueError(f"expected a name of lower-case letters, digits, dots and dashes, got {name!r}")
    for known in read_index(store)["models"]:
        if known["name"] == name or known["file"] == f"{name}.safetensors":
            raise ValueError(f"expected a name of no model or file of {store / INDEX} yet, got {name}")


def enter(
    store: Path,
    name: str,
    size: str,
    tensors: dict[str, Tensor],
    description: str,
    training: dict[str, Any],
    make_default: bool,
) -> dict[str, object]:
    """Write what `ship` made into a store that has no model of that name. Returns the entry.

    Raises:
        ValueError: the store has these very weights under another name.
    """
    store.mkdir(parents=True, exist_ok=True)
    data = save(tensors, {"limpid": description})
    entry: dict[str, object] = {
        "name": name,
        "size": size,
        "file": f"{name}.safetensors",
        "sha256": hashlib.sha256(data).hexdigest(),
        "known_answer": known_answer(ShippedCodec.from_tensors(tensors, description, torch.device("cpu"))),
        "training": training,
    }
    index = read_index(store)
    if same := [known["name"] for known in index["models"] if known["sha256"] == entry["sha256"]]:
        raise ValueError(f"expected other weights than those of {same[0]}, whose streams could not be told from these")
    index["models"].append(entry)
    if make_default or "default" not in index:
        index["default"] = name
    replace_file(store / f"{name}.safetensors", data)
    write_index(store, {"default": index["default"], **index})
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.training.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of a run")
    parser.add_argument("--name", required=True, help="name of the model, for example edge-2")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--photos", type=Path, help="folder of photographs to count symbols on: smaller bitstreams")
    parser.add_argument("--batches", type=int, default=COUNTED_BATCHES, help="of four crops to count symbols on")
    parser.add_argument("--keep-default", action="store_true", help="do not make it the store's default")
    args = parser.parse_args()
    entry = export(args.checkpoint, args.name, args.store, not args.keep_default, args.photos, args.batches)
    if args.store.resolve() == STORE:
        keep_weights(args.checkpoint, STATES / f"{entry['size']}.safetensors")
    print(json.dumps(entry, indent=2))


if __name__ == "__main__":
    main()
