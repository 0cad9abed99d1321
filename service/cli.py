"""`python -m service` (also `limpid`): serve; compress and decompress without a server; look after a model store."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from service.settings import Settings


def _serve(args: argparse.Namespace, _: Settings) -> None:
    from service.server import serve

    chosen = {name: value for name in ("host", "port") if (value := getattr(args, name)) is not None}
    serve(Settings(**chosen))


def _compress(args: argparse.Namespace, settings: Settings) -> None:
    from service.engine import EncodeJob, Engine
    from service.imaging import read_photo
    from service.store import ModelStore

    photo = read_photo(args.input.read_bytes(), settings.max_pixels)
    engine = Engine(ModelStore(settings.store), settings.device, settings.precision)
    (stream,) = engine.encode([EncodeJob(photo, args.rate, args.model)])
    data = stream.to_bytes()
    args.output.write_bytes(data)
    print(f"{args.output}: {len(data)} bytes, {8 * len(data) / stream.pixels:.3f} bits per pixel")


def _decompress(args: argparse.Namespace, settings: Settings) -> None:
    from service.codec.bitstream import Bitstream
    from service.engine import Engine
    from service.imaging import OutputFormat, write_photo
    from service.store import ModelStore

    stream = Bitstream.from_bytes(args.input.read_bytes())
    if stream.pixels > settings.max_pixels:
        raise ValueError(f"expected at most {settings.max_pixels} pixels, got {stream.width}x{stream.height}")
    suffix = args.output.suffix.lower().lstrip(".").replace("jpg", "jpeg")
    outputs = {output.name.lower(): output for output in OutputFormat}
    if suffix not in outputs:
        raise ValueError(f"expected an output name that ends in one of {', '.join(outputs)}, got {args.output}")
    engine = Engine(ModelStore(settings.store), settings.device, settings.precision)
    (photo,) = engine.decode([stream])
    args.output.write_bytes(write_photo(photo, outputs[suffix]))
    print(f"{args.output}: {stream.width}x{stream.height}")


def _variants(_: argparse.Namespace, settings: Settings) -> None:
    from service.store import ModelStore

    store = ModelStore(settings.store)
    for entry in store.index.models:
        mark = " (default)" if entry.name == store.index.default else ""
        print(f"{entry.name}{mark}: size {entry.size}, id {entry.model_id.hex()}, {entry.rate_points} rate points")
        for m in entry.measured:
            print(f"  rate {m.rate}  {m.photos:10} {m.degradation:12} {m.bpp:6.3f} bpp  {m.psnr:5.2f} dB")


def _verify(args: argparse.Namespace, settings: Settings) -> None:
    import torch

    from service.store import ModelStore

    store = ModelStore(args.store or settings.store)
    for entry in store.index.models:
        store.load(entry, torch.device("cpu"))
        print(f"{entry.name}: {entry.sha256} {entry.file}, known answer {entry.known_answer[:16]}...: good")


def _add(args: argparse.Namespace, settings: Settings) -> None:
    from service.store import ModelStore

    store = ModelStore(args.store or settings.store)
    store.add(ModelStore(args.source), args.name)
    print(f"{args.name}: added to {store.folder}; the default is still {store.index.default}")


def _default(args: argparse.Namespace, settings: Settings) -> None:
    from service.store import ModelStore

    store = ModelStore(args.store or settings.store)
    store.set_default(args.name)
    print(f"{args.name}: the default of {store.folder}; a running service takes it up on SIGHUP")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="limpid", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run the HTTP service; settings come from LIMPID_* variables")
    serve.add_argument("--host", help="address to listen on")
    serve.add_argument("--port", type=int, help="port to listen on, 0 for any")
    serve.set_defaults(run=_serve)
    compress = commands.add_parser("compress", help="a photo to a bitstream")
    compress.add_argument("input", type=Path)
    compress.add_argument("output", type=Path)
    compress.add_argument("--rate", type=int, default=4, choices=range(1, 9), metavar="1..8")
    compress.add_argument("--model", help="name of a model of the store")
    compress.set_defaults(run=_compress)
    decompress = commands.add_parser("decompress", help="a bitstream to the clean photo")
    decompress.add_argument("input", type=Path)
    decompress.add_argument("output", type=Path, help="a .png, .jpg, .webp or .avif name")
    decompress.set_defaults(run=_decompress)
    variants = commands.add_parser("variants", help="the models of the store and what was measured of them")
    variants.set_defaults(run=_variants)
    store = commands.add_parser("store", help="look after a model store")
    actions = store.add_subparsers(dest="action", required=True)
    verify = actions.add_parser("verify", help="check digests and known answers of every model")
    add = actions.add_parser("add", help="copy a model of another store, checked first")
    add.add_argument("source", type=Path, help="folder of the other store")
    add.add_argument("name", help="name of the model")
    default = actions.add_parser("default", help="choose the model for requests that name none")
    default.add_argument("name", help="name of the model")
    for action, run in ((verify, _verify), (add, _add), (default, _default)):
        action.add_argument("--store", type=Path, help="folder of the store, else LIMPID_STORE")
        action.set_defaults(run=run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, or 1 after an error that was printed."""
    args = _parser().parse_args(argv)
    try:
        args.run(args, Settings())
    except (ValueError, OSError) as error:
        print(f"limpid: {error}", file=sys.stderr)
        return 1
    return 0
