"""`python -m model_store.evaluation`: measure peers and models on real bytes, then report.

peers    JPEG, WebP and AVIF on every photo and condition        -> results/peers-SET.json
cascade  OpenCV's non-local means before them, on noisy photos   -> results/cascade-SET.json
model    one model of the store, the same inputs                 -> results/NAME-SET.json
report   table and plots from these; the means go into store.json -> results/NAME.md, NAME-SET.png
naming   does the model's report name what the generator did?    -> results/NAME-naming.json
generations   compress the result again, ten times, at rate 6    -> results/NAME-generations.json
sheets   photos without ground truth, before and after           -> results/NAME-FOLDER.jpg
features maps of the encoder's attentions, and an embedding      -> results/NAME-maps.jpg, NAME-embedding.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model_store.evaluation.codecs import PEERS, LimpidCodec, denoised, peer_points
from model_store.evaluation.conditions import MEASURED, SETS, psnr, samples
from model_store.evaluation.features import Watched, draw_embedding, draw_maps
from model_store.evaluation.rate_distortion import Record, curves, read_records
from model_store.evaluation.tables import plot, published_table, table
from model_store.evaluation.trials import contact_sheet, generations, naming
from model_store.index import read_index, write_index
from model_store.training.photos import photo_paths
from service.codec.device import pick_device, transform_precision

STORE = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

STRENGTHS = (5, 8, 11, 14, 18, 23, 28, 34, 42, 52)
"""What the cascade's denoiser is tuned over, on every eighth photo of a set, for each condition."""


def _write(path: Path, records: list[Record]) -> None:
    content = {
        "command": " ".join(["python -m model_store.evaluation", *map(_relative, sys.argv[1:])]),
        "torch": torch.__version__,
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "precision": transform_precision(pick_device("auto")),
        "records": [asdict(record) for record in records],
    }
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(content)
    path.write_text(text.replace('{"set"', '\n{"set"') + "\n")


def _relative(argument: str) -> str:
    return os.path.relpath(argument) if argument.startswith("/") else argument


def _peers(args: argparse.Namespace) -> None:
    for name in args.sets:
        records = []
        for sample in tqdm(list(samples(args.photos, name, args.limit)), desc=f"peers, {name}"):
            pixels = sample.clean.shape[0] * sample.clean.shape[1]
            key = (name, sample.photo, sample.condition.name)
            if sample.condition.name != "clean":
                records.append(Record(*key, "INPUT", 0, 0, 0.0, round(psnr(sample.degraded, sample.clean), 4)))
            for format in PEERS:
                for quality, size, decoded in peer_points(format, sample.degraded):
                    value = round(psnr(decoded, sample.clean), 4)
                    records.append(Record(*key, format, quality, size, round(8 * size / pixels, 5), value))
        _write(args.results / f"peers-{name}.json", records)


def _cascade(args: argparse.Namespace) -> None:
    for name in args.sets:
        chosen = [s for s in samples(args.photos, name, args.limit) if s.condition.name.startswith("noise-")]
        if not chosen:
            continue
        strengths = {}
        for condition in dict.fromkeys(sample.condition.name for sample in chosen):
            tuned_on = [sample for sample in chosen if sample.condition.name == condition][::8]
            scores = {h: np.mean([psnr(denoised(s.degraded, h), s.clean) for s in tuned_on]) for h in STRENGTHS}
            strengths[condition] = max(scores, key=lambda h: scores[h])
            print(condition, {h: round(float(score), 2) for h, score in scores.items()})
        records = []
        for sample in tqdm(chosen, desc=f"cascade, {name}"):
            pixels = sample.clean.shape[0] * sample.clean.shape[1]
            photo = denoised(sample.degraded, strengths[sample.condition.name])
            for format in ("WEBP", "AVIF"):
                for quality, size, decoded in peer_points(format, photo):
                    key = (name, sample.photo, sample.condition.name, f"NLM+{format}")
                    value = round(psnr(decoded, sample.clean), 4)
                    records.append(Record(*key, quality, size, round(8 * size / pixels, 5), value))
        _write(args.results / f"cascade-{name}.json", records)


def _model(args: argparse.Namespace) -> None:
    codec = LimpidCodec(args.store, args.name)
    for name in args.sets:
        records = []
        for sample in tqdm(list(samples(args.photos, name, args.limit)), desc=f"{codec.entry['name']}, {name}"):
            pixels = sample.clean.shape[0] * sample.clean.shape[1]
            for rate, size, restored in codec.points(sample):
                value = round(psnr(restored, sample.clean), 4)
                key = (name, sample.photo, sample.condition.name)
                records.append(Record(*key, "LIMPID", rate, size, round(8 * size / pixels, 5), value))
        _write(args.results / f"{codec.entry['name']}-{name}.json", records)


def _naming(args: argparse.Namespace) -> None:
    codec = LimpidCodec(args.store, args.name)
    named = naming(codec, args.photos, args.limit)
    _save(args.results / f"{codec.entry['name']}-naming.json", named)


def _generations(args: argparse.Namespace) -> None:
    codec = LimpidCodec(args.store, args.name)
    _save(args.results / f"{codec.entry['name']}-generations.json", generations(codec, args.photos, args.limit))


def _save(path: Path, content: dict[str, object]) -> None:
    print(json.dumps(content["summary"], indent=2))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _sheets(args: argparse.Namespace) -> None:
    codec = LimpidCodec(args.store, args.name)
    for folder in ("rni15", "real"):
        path = args.results / f"{codec.entry['name']}-{folder}.jpg"
        contact_sheet(codec, photo_paths(args.photos / folder)[: args.limit]).save(path, quality=82)
        print(path.name)


def _features(args: argparse.Namespace) -> None:
    watched, photos = Watched(args.store, args.name), sorted((args.photos / "kodak").glob("*.png"))[: args.limit]
    draw_maps(watched, args.photo or photos[len(photos) // 2], args.results / f"{watched.name}-maps.jpg")
    share = draw_embedding(watched, photos, args.results / f"{watched.name}-embedding.png")
    print(f"{share:.1%} of the photos lie nearest to the centre of their own kind")


def _report(args: argparse.Namespace) -> None:
    name = args.name or read_index(args.store)["default"]
    paths = [args.results / f"{kind}-{photos}.json" for photos in MEASURED for kind in ("peers", "cascade", name)]
    records = read_records(path for path in paths if path.exists())
    text = table(records) + "\n\n" + published_table(records)
    print(text)
    (args.results / f"{name}.md").write_text(text + "\n")
    for drawn in plot(records, name, args.results):
        print(drawn.name)
    index = read_index(args.store)
    (entry,) = [entry for entry in index["models"] if entry["name"] == name]
    entry["measured"] = [
        {"rate": rate, "degradation": condition, "photos": photos, "bpp": round(bpp, 4), "psnr": round(value, 3)}
        for (photos, condition, codec), curve in curves(records).items()
        if codec == "LIMPID"
        for rate, bpp, value in zip(curve.setting, curve.bpp, curve.psnr)
    ]
    write_index(args.store, index)


COMMANDS = {
    "peers": _peers,
    "cascade": _cascade,
    "model": _model,
    "report": _report,
    "naming": _naming,
    "generations": _generations,
    "sheets": _sheets,
    "features": _features,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, run in COMMANDS.items():
        sub = commands.add_parser(command)
        sub.set_defaults(run=run)
        sub.add_argument("--results", type=Path, default=RESULTS)
        if command not in ("peers", "cascade"):
            sub.add_argument("--name", help="model of the store; its default otherwise")
            sub.add_argument("--store", type=Path, default=STORE)
        if command != "report":
            sub.add_argument("--photos", type=Path, required=True, help="folder that holds the sets as subfolders")
            if command in ("peers", "cascade", "model"):
                sub.add_argument("--sets", nargs="+", default=list(MEASURED), choices=list(SETS))
            if command == "features":
                sub.add_argument("--photo", type=Path, help="the photo of the maps")
            sub.add_argument("--limit", type=int, help="only the first photos of each set")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    args.run(args)


if __name__ == "__main__":
    main()
