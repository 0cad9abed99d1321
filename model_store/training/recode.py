"""`python -m model_store.training.recode`: a model of the store again, with the entropy coding of today.

Transforms, prior and report stay, number for number, and so does every picture but for latents that are no longer
coded: those that the prior is all but certain of (`CodecConfig.skipped`). The frequencies of the rest are counted on
photographs.
Streams of the old model need the old model: the new one has a name and an id of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from model_store.training.export import STORE, enter, read_index, refuse_known
from model_store.training.frequencies import COUNTED_BATCHES, with_counted_tables
from service.codec.config import CONFIGS


def recode(
    store: Path, model: str, name: str, photos: Path, make_default: bool = True, batches: int = COUNTED_BATCHES
) -> dict[str, object]:
    """Enter `model` of a store as `name`. Returns the entry.

    Raises:
        ValueError: the store has no `model`, or already a `name`.
    """
    refuse_known(store, name)
    known = {entry["name"]: entry for entry in read_index(store)["models"]}
    if model not in known:
        raise ValueError(f"expected one of {', '.join(known)}, got {model}")
    path = store / known[model]["file"]
    with safe_open(path, framework="pt") as opened:
        description = json.loads(opened.metadata()["limpid"])
    description["config"]["skipped"] = CONFIGS[known[model]["size"]].skipped
    stated = json.dumps(description, sort_keys=True)
    tensors = with_counted_tables(load_file(path), stated, photos, batches)
    training = {
        **known[model]["training"],
        "weights_of": model,
        "recoded": datetime.date.today().isoformat(),
        "batches_counted": batches,
    }
    return enter(store, name, known[model]["size"], tensors, stated, training, make_default)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.training.recode", description=__doc__)
    parser.add_argument("model", help="of the store")
    parser.add_argument("--name", required=True, help="of the new one")
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs to count symbols on")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--keep-default", action="store_true", help="do not make it the store's default")
    args = parser.parse_args()
    print(json.dumps(recode(args.store, args.model, args.name, args.photos, not args.keep_default), indent=2))


if __name__ == "__main__":
    main()
