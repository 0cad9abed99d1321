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

from model_store.index import STORE, read_model
from model_store.training.export import check_new_name, enter
from model_store.training.frequencies import COUNTED_BATCHES, with_counted_tables
from service.codec.config import CONFIGS


def recode(
    store: Path, model: str, name: str, photos: Path, make_default: bool = True, batches: int = COUNTED_BATCHES
) -> dict[str, object]:
    """Enter `model` of a store as `name`. Returns the entry.

    Raises:
        ValueError: the store has no `model`, or already a `name`.
    """
    check_new_name(store, name)
    old = read_model(store, model)
    size, description = old.entry["size"], json.loads(old.description)
    description["config"]["skipped"] = CONFIGS[size].skipped
    stated = json.dumps(description, sort_keys=True)
    tensors = with_counted_tables(old.tensors, stated, photos, batches)
    training = {
        **old.entry["training"],
        "weights_of": model,
        "recoded": datetime.date.today().isoformat(),
        "batches_counted": batches,
    }
    return enter(store, name, size, tensors, stated, training, make_default)


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
