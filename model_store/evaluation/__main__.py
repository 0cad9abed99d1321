"""`python -m model_store.evaluation`: measure peers and models on real bytes, then report.

peers    JPEG, WebP and AVIF on every photo and condition        -> results/peers-SET.json
cascade  OpenCV's non-local means before them, on noisy photos   -> results/cascade-SET.json
model    one model of the store, the same inputs                 -> results/NAME-SET.json
report   table and plots from these; the means go into store.json -> results/NAME.md, NAME-SET.png
naming   does the model's report name what the generator did?    -> results/NAME-naming.json
generations   compress the result again, ten times, at rate 6    -> results/NAME-generations.json
effort   what refinement saves on Kodak, under each condition      -> results/NAME-effort-CONDITION.json
sheets   photos without ground truth, before and after           -> results/NAME-FOLDER.jpg
features maps of the encoder's attentions, and an embedding      -> results/NAME-maps.jpg, NAME-embedding.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from model_store.evaluation.codecs import LimpidCodec
from model_store.evaluation.conditions import ALL_RATES, MEASURED, SETS, clean_paths
from model_store.evaluation.features import Watched, draw_embedding, draw_maps
from model_store.evaluation.measuring import (
    TUNED_EVERY,
    Work,
    best_shares,
    cascade_of,
    is_gaussian,
    model_of,
    of_each_photo,
    peers_of,
    refined_of,
    tried_of,
)
from model_store.evaluation.rate_distortion import Record, check_same_photos, curves, read_records
from model_store.evaluation.tables import effort_table, plot, published_table, table
from model_store.evaluation.trials import contact_sheet, generations, naming
from model_store.images import photo_paths
from model_store.index import STORE, read_index, replace_file, write_index
from service.codec.config import MOST_EFFORT
from service.codec.device import pick_device, transform_precision

RESULTS = Path(__file__).parent / "results"


def _told(jobs: int = 1) -> dict[str, object]:
    """How the figures of this run came about."""
    return {
        "command": " ".join(["python -m model_store.evaluation", *map(_relative, sys.argv[1:])]),
        "torch": torch.__version__,
        "processes": jobs,
        "cpus": os.cpu_count(),
        "precision": transform_precision(pick_device("auto")),
    }


def _write(path: Path, records: Sequence[Record], jobs: int, **more: object) -> None:
    if not records:
        raise ValueError(f"nothing was measured for {path.name}: its condition has none of these rate points")
    content = {**_told(jobs), **more, "records": [asdict(record) for record in records]}
    text = json.dumps(content)
    replace_file(path, (text.replace('{"set"', '\n{"set"') + "\n").encode())
    check_same_photos(records)


def _relative(argument: str) -> str:
    return os.path.relpath(argument) if argument.startswith("/") else argument


def _measure(args: argparse.Namespace, who: str, name: str, work: Work, **more: object) -> None:
    records = of_each_photo(args.photos, name, work, args.jobs, args.limit)
    _write(args.results / f"{who}-{name}.json", records, args.jobs, **more)


def _peers(args: argparse.Namespace) -> None:
    for name in args.sets:
        _measure(args, "peers", name, peers_of)


def _cascade(args: argparse.Namespace) -> None:
    for name in args.sets:
        if any(is_gaussian(condition) for condition in SETS[name]):
            shares = best_shares(of_each_photo(args.photos, name, tried_of, args.jobs, args.limit, TUNED_EVERY))
            print(json.dumps(shares))
            _measure(args, "cascade", name, partial(cascade_of, shares), strength_over_sigma=shares)


def _model(args: argparse.Namespace) -> None:
    model = args.name or read_index(args.store)["default"]
    for name in args.sets:
        _measure(args, model, name, partial(model_of, args.store, model))


def _naming(args: argparse.Namespace) -> None:
    codec = LimpidCodec(args.store, args.name)
    named = naming(codec, args.photos, args.limit)
    _save(args.results / f"{codec.entry['name']}-naming.json", named)


def _generations(args: argparse.Namespace) -> None:
    codec = LimpidCodec(args.store, args.name)
    _save(args.results / f"{codec.entry['name']}-generations.json", generations(codec, args.photos, args.limit))


def _save(path: Path, content: dict[str, object]) -> None:
    print(json.dumps(content["summary"], indent=2))
    replace_file(path, (json.dumps({**_told(), **content}, indent=1) + "\n").encode())


def _effort(args: argparse.Namespace) -> None:
    model = args.name or read_index(args.store)["default"]
    for condition in args.conditions:
        work = partial(refined_of, args.store, model, (0, *args.efforts), condition, args.rates)
        records = of_each_photo(args.photos, "kodak", work, args.jobs, args.limit)
        _write(args.results / f"{model}-effort-{condition}.json", records, args.jobs)
        print(effort_table(records))


def _sheets(args: argparse.Namespace) -> None:
    codec = LimpidCodec(args.store, args.name)
    for folder in ("rni15", "real"):
        path = args.results / f"{codec.entry['name']}-{folder}.jpg"
        contact_sheet(codec, photo_paths(args.photos / folder)[: args.limit]).save(path, quality=82)
        print(path.name)


def _features(args: argparse.Namespace) -> None:
    watched, photos = Watched(args.store, args.name), clean_paths(args.photos, "kodak")[: args.limit]
    draw_maps(watched, args.photo or photos[len(photos) // 2], args.results / f"{watched.name}-maps.jpg")
    share = draw_embedding(watched, photos, args.results / f"{watched.name}-embedding.png")
    print(f"{share:.1%} of the photos are put among their own kind")


def _report(args: argparse.Namespace) -> None:
    index = read_index(args.store)
    name = args.name or index["default"]
    entry = next((entry for entry in index["models"] if entry["name"] == name), None)
    if entry is None:
        raise ValueError(f"expected a model of {args.store}, got {name}")
    paths = [args.results / f"{kind}-{photos}.json" for photos in MEASURED for kind in ("peers", "cascade", name)]
    records = read_records(path for path in paths if path.exists())
    check_same_photos(records)
    if not any(record.codec == "LIMPID" for record in records):
        raise ValueError(f"expected results of {name} in {args.results}, found none")
    text = table(records) + "\n\n" + published_table(records)
    print(text)
    replace_file(args.results / f"{name}.md", (text + "\n").encode())
    for drawn in plot(records, name, args.results):
        print(drawn.name)
    entry["measured"] = [
        {"rate": rate, "degradation": condition, "photos": photos, "bpp": round(bpp, 4), "psnr": round(value, 3)}
        for (photos, condition, codec), curve in curves(records).items()
        if codec == "LIMPID"
        for rate, bpp, value in zip(curve.setting, curve.bpp, curve.psnr)
    ]
    write_index(args.store, index)


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError
    return count


_count.__name__ = "count of 1 or more"  # as argparse names it


COMMANDS = {
    "peers": _peers,
    "cascade": _cascade,
    "model": _model,
    "report": _report,
    "naming": _naming,
    "generations": _generations,
    "effort": _effort,
    "sheets": _sheets,
    "features": _features,
}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m model_store.evaluation", description=__doc__, formatter_class=raw)
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
            if command == "effort":
                sub.add_argument(
                    "--efforts", nargs="+", type=int, default=[4], choices=range(1, MOST_EFFORT + 1), help="beside 0"
                )
                sub.add_argument("--rates", nargs="+", type=int, default=list(ALL_RATES), choices=ALL_RATES)
                conditions = [condition.name for condition in SETS["kodak"]]
                sub.add_argument("--conditions", nargs="+", default=conditions[:4], choices=conditions)
            if command in ("peers", "cascade", "model", "effort"):
                at_once = 1 if pick_device("auto").type == "cuda" else os.cpu_count()
                sub.add_argument("--jobs", type=int, default=at_once, help="processes at a time")
            if command == "features":
                sub.add_argument("--photo", type=Path, help="the photo of the maps")
            sub.add_argument("--limit", type=_count, help="only the first photos of each set")
    args = parser.parse_args()
    if getattr(args, "limit", None) and args.results == RESULTS:
        parser.error("expected --results of its own with --limit: these hold all photos")
    args.results.mkdir(parents=True, exist_ok=True)
    try:
        args.run(args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
