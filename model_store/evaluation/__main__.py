"""`python -m model_store.evaluation`: measure peers and models on real bytes, then report.

peers    JPEG, WebP and AVIF on every photo and condition -> results/peers-SET.json
model    one model of the store, the same inputs          -> results/NAME-SET.json
report   table and plots from both; the model's means go into store.json for /variants
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from model_store.evaluation.codecs import PEERS, LimpidCodec, peer_points
from model_store.evaluation.conditions import SETS, psnr, samples
from model_store.evaluation.report import RESULTS, Record, curves, plot, read_records, table

STORE = Path(__file__).parents[1]


def _write(path: Path, records: list[Record]) -> None:
    content = {
        "command": " ".join(["python -m model_store.evaluation", *map(_relative, sys.argv[1:])]),
        "torch": torch.__version__,
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
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
                for quality, size, decoded in peer_points(format, sample):
                    value = round(psnr(decoded, sample.clean), 4)
                    records.append(Record(*key, format, quality, size, round(8 * size / pixels, 5), value))
        _write(args.results / f"peers-{name}.json", records)


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


def _report(args: argparse.Namespace) -> None:
    path = args.store / "store.json"
    index = json.loads(path.read_text())
    name = args.name or index["default"]
    paths = [*args.results.glob("peers-*.json"), *args.results.glob(f"{name}-*.json")]
    records = read_records(sorted(paths, key=lambda p: (p.stem.split("-")[-1] != "kodak", p.stem)))
    text = table(records)
    print(text)
    (args.results / f"{name}.md").write_text(text + "\n")
    for drawn in plot(records, args.results):
        print(drawn.name)
    (entry,) = [entry for entry in index["models"] if entry["name"] == name]
    entry["measured"] = [
        {"rate": rate, "degradation": condition, "photos": photos, "bpp": round(bpp, 4), "psnr": round(value, 3)}
        for (photos, condition, codec), curve in curves(records).items()
        if codec == "LIMPID"
        for rate, bpp, value in zip(curve.setting, curve.bpp, curve.psnr)
    ]
    path.write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model_store.evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, run in (("peers", _peers), ("model", _model), ("report", _report)):
        sub = commands.add_parser(command)
        sub.set_defaults(run=run)
        sub.add_argument("--results", type=Path, default=RESULTS)
        if command != "peers":
            sub.add_argument("--name", help="model of the store; its default otherwise")
            sub.add_argument("--store", type=Path, default=STORE)
        if command != "report":
            sub.add_argument("--photos", type=Path, required=True, help="folder that holds the sets as subfolders")
            sub.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
            sub.add_argument("--limit", type=int, help="only the first photos of each set")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
