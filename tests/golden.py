"""`python -m tests.golden [MODEL]`: add golden bitstreams of a model of the store, its default otherwise.

They are made once per model and never again: a test decodes them with every later version of the code.
"""

from __future__ import annotations

import argparse
import hashlib
import json

import torch

from service.codec.shipped import Coded, latent_size
from service.engine import EncodeJob, Engine
from service.settings import Settings
from service.store import ModelStore
from tests.conftest import DATA, noisy, photo


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("model", nargs="?", help="its name in the store")
    args = parser.parse_args()
    settings = Settings()
    engine = Engine(ModelStore(settings.store), "cpu")
    model = engine.model(args.model)
    folder = DATA / "golden"
    folder.mkdir(exist_ok=True)
    listing = folder / "digests.json"
    digests = json.loads(listing.read_text()) if listing.exists() else {}
    for name, clean, rate in (
        ("parrots", photo("parrots"), 1),
        ("bikes", photo("bikes"), 4),
        ("bikes", photo("bikes"), 8),
    ):
        pixels = noisy(clean)[: 150 if rate == 4 else None, : 181 if rate == 4 else None]
        (stream,) = engine.encode([EncodeJob(pixels, rate, model.entry.name)])
        h, w = latent_size(stream.height, stream.width)
        coded = Coded(stream.payload, stream.outliers)
        y_hat = model.codec.read([coded], torch.tensor([rate - 1]), h, w)
        path = folder / f"{model.entry.name}-{name}-{rate}.lmp"
        if path.exists():
            raise SystemExit(f"{path} exists: golden bitstreams are never made again")
        path.write_bytes(stream.to_bytes())
        digests[path.name] = hashlib.sha256((y_hat * 16).to(torch.int32).numpy().astype("<i4").tobytes()).hexdigest()
    listing.write_text(json.dumps(digests, indent=2) + "\n")


if __name__ == "__main__":
    main()
