"""`limpid` (also `python -m service`): a learned image codec that compresses and restores at once."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from tqdm import tqdm

from service.arguments import positive
from service.budget import MOST_BPP
from service.client import Client, LimpidError, Policy
from service.codec.config import MOST_EFFORT
from service.files import PHOTO_ENDINGS, Pair, is_folder, names_a_file, overlooked, pair_up, sources, write_whole
from service.imaging import OutputFormat
from service.settings import Settings, service_settings

if TYPE_CHECKING:
    from service.local import Local

ERRORS = (ValueError, OSError, MemoryError, RuntimeError, LimpidError)
"""Of one file, after which the others go on; RuntimeError is torch's, of a device that is missing or full."""

STREAM_ENDINGS = (".lmp",)
"""Of the files in a folder that are taken for bitstreams."""

LOCAL_AT_ONCE, REMOTE_AT_ONCE = 2, 8
PATIENCE = 1.0
"""Seconds for which a single photo may work without a sign."""


def _serve(args: argparse.Namespace) -> int:
    from service.server import serve

    chosen = {name: value for name in ("host", "port") if (value := getattr(args, name)) is not None}
    serve(service_settings(**chosen))
    return 0


def _codec(args: argparse.Namespace) -> Client | Local:
    """The codec that the arguments choose: a server's with `--url`, else this machine's."""
    if args.url is not None:
        policy = Policy(deadline=args.deadline) if args.deadline else Policy()
        return Client(args.url, args.api_key or os.environ.get("LIMPID_API_KEY"), policy)
    for option, value in (("--deadline", args.deadline), ("--api-key", args.api_key)):
        if value:
            raise ValueError(f"expected {option} only with --url")
    from service.local import Local

    return Local(Settings())


def _run(
    pairs: Sequence[Pair],
    work: Callable[[bytes], tuple[bytes, str]],
    args: argparse.Namespace,
    codec: Client | Local,
) -> int:
    """Do `work` for each pair, a few at a time; name every file that fails and go on. Returns the exit status.

    On a terminal a bar shows the files that are done, or of a single one that takes long here, how far it is.
    """
    alone = codec if len(pairs) == 1 and not isinstance(codec, Client) else None
    unit, delay = ("step", PATIENCE) if alone else ("file", 0)
    bar = tqdm(total=len(pairs), unit=unit, delay=delay, disable=None, leave=False)
    if alone:
        alone.watch(lambda done, total: _show(bar, done, total))

    def input_of(pair: Pair) -> bytes:
        if pair.target is None and args.output_is_closed:
            raise OSError("standard output is closed")
        if pair.target and pair.target.exists() and not args.force:
            raise FileExistsError(f"{pair.target} exists, --force overwrites it")
        return _read(pair.source)

    def one(pair: Pair, data: bytes | None = None) -> str:
        result, said = work(input_of(pair) if data is None else data)
        if pair.target is None:
            sys.stdout.buffer.write(result)
            sys.stdout.buffer.flush()
            return ""
        pair.target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(pair.target, result, overwrite=args.force)
        return f"{pair.target}: {len(result)} bytes, {said}"

    def begun(pair: Pair) -> Future[str]:
        if len(pairs) > 1:
            return pool.submit(one, pair)
        try:  # in this thread, where Ctrl-C ends the wait for a pipe
            return pool.submit(one, pair, input_of(pair))
        except ERRORS as error:
            failure: Future[str] = Future()
            failure.set_exception(error)
            return failure

    failed = 0
    pool = ThreadPoolExecutor(REMOTE_AT_ONCE if isinstance(codec, Client) else LOCAL_AT_ONCE)
    try:
        jobs = [begun(pair) for pair in pairs]
        for pair, job in zip(pairs, jobs):
            try:
                if said := job.result():
                    tqdm.write(said)
            except BrokenPipeError:
                raise
            except ERRORS as error:
                failed += 1
                tqdm.write(f"limpid: {pair.source or 'standard input'}: {_words(error, pair.source)}", file=sys.stderr)
            if not alone:
                bar.update()
    except KeyboardInterrupt:
        codec.give_up()
        raise
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    if len(pairs) > 1:
        print(f"{len(pairs) - failed} of {len(pairs)} files done, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


def _show(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _read(source: Path | None) -> bytes:
    if source:
        return source.read_bytes()
    if sys.stdin is None:
        raise OSError("standard input is closed")
    return sys.stdin.buffer.read()


def _words(error: BaseException, source: Path | None) -> str:
    """What is said of an error, after the name of what was read; another file that it is about is named."""
    if isinstance(error, LimpidError):
        return error.detail
    if isinstance(error, OSError) and error.strerror:
        other = error.filename is not None and str(error.filename) != str(source)
        return f"{error.filename}: {error.strerror}" if other else error.strerror
    return str(error) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)


def _tell_of(left_out: Sequence[tuple[Path, str]]) -> None:
    for path, why in left_out:
        print(f"limpid: {path} is left out: {why}", file=sys.stderr)


def _compress(args: argparse.Namespace) -> int:
    if args.output and names_a_file(args.output) and Path(args.output).suffix.lower() in PHOTO_ENDINGS:
        raise ValueError(f"expected an output name for a bitstream, such as a.lmp, got {args.output}")
    _tell_of(overlooked(args.inputs, PHOTO_ENDINGS, images=True))
    pairs = pair_up(args.inputs, args.output, takes=PHOTO_ENDINGS, gives=".lmp")
    with closing(_codec(args)) as codec:

        def work(data: bytes) -> tuple[bytes, str]:
            done = codec.compress(
                data,
                rate=args.rate,
                max_bytes=args.max_bytes,
                target_bpp=args.target_bpp,
                model=args.model,
                effort=args.effort,
            )
            return done.bitstream, f"{done.bpp:.3f} bits per pixel at rate point {done.rate}"

        return _run(pairs, work, args, codec)


def _decompress(args: argparse.Namespace) -> int:
    formats = {f".{output.name.lower()}": output for output in OutputFormat} | {".jpg": OutputFormat.JPEG}
    alone = len(sources(args.inputs, takes=STREAM_ENDINGS)) == 1 and not is_folder(args.inputs[0])
    named = Path(args.output).suffix.lower() if args.output and alone and names_a_file(args.output) else ""
    chosen = f".{args.format}" if args.format else named or ".png"
    if chosen not in formats:
        raise ValueError(f"expected an output name that ends in one of {', '.join(formats)}, got {args.output}")
    output = formats[chosen]
    if formats.get(named, output) is not output:
        raise ValueError(f"expected an output name that goes with --format {args.format}, got {args.output}")
    if args.quality is not None and output.default_quality is None:
        raise ValueError(f"expected --quality only with a lossy format, got it with {output.name}")
    _tell_of(overlooked(args.inputs, STREAM_ENDINGS))
    pairs = pair_up(args.inputs, args.output, takes=STREAM_ENDINGS, gives=chosen)
    with closing(_codec(args)) as codec:

        def work(data: bytes) -> tuple[bytes, str]:
            done = codec.decompress(data, media_type=output.media_type, quality=args.quality)
            return done.image, f"restored from {len(data)} bytes by {done.model}"

        return _run(pairs, work, args, codec)


def _info(args: argparse.Namespace) -> int:
    from service.inspection import describe

    failed, store, found = 0, Settings().store, sources(args.inputs, takes=STREAM_ENDINGS)
    _tell_of(overlooked(args.inputs, STREAM_ENDINGS))
    for source in found:
        name = str(source or "standard input")
        try:
            facts = describe(_read(source), store)
        except ERRORS as error:
            failed += 1
            print(f"limpid: {name}: {_words(error, source)}", file=sys.stderr)
            continue
        if args.json:
            print(json.dumps({"file": name, **facts}))
        else:
            print(name)
            for label, value in facts.items():
                print(f"  {label.replace('_', ' '):18} {value}")
    return 1 if failed else 0


def _compare(args: argparse.Namespace) -> int:
    from service.inspection import compare

    original, stream = args.photo.read_bytes(), args.bitstream.read_bytes()
    with closing(_codec(args)) as codec:
        restored = codec.decompress(stream).image
    # A server's client needs no setting of the service, one of which may be amiss here.
    most = Settings.model_fields["max_pixels"].default if args.url is not None else Settings().max_pixels
    for label, value in compare(original, stream, restored, most).items():
        print(f"{label:34} {value}")
    return 0


def _variants(_: argparse.Namespace) -> int:
    from service.store import ModelStore

    store = ModelStore(Settings().store)
    for entry in store.index.models:
        mark = " (default)" if entry.name == store.index.default else ""
        print(f"{entry.name}{mark}: size {entry.size}, id {entry.model_id.hex()}, {entry.rate_points} rate points")
        for m in entry.measured:
            print(f"  rate {m.rate}  {m.photos:10} {m.degradation:12} {m.bpp:6.3f} bpp  {m.psnr:5.2f} dB")
    return 0


def _verify(args: argparse.Namespace) -> int:
    import torch

    from service.store import ModelStore, StoreError

    store, failed = ModelStore(args.store or Settings().store), 0
    for entry in store.index.models:
        try:
            store.load(entry, torch.device("cpu"))
        except StoreError as error:
            failed += 1
            print(f"limpid: {error}", file=sys.stderr)
        else:
            print(f"{entry.name}: {entry.sha256} {entry.file}, known answer {entry.known_answer[:16]}...: good")
    return 1 if failed else 0


def _add(args: argparse.Namespace) -> int:
    from service.store import STORE_FILE, ModelStore

    folder, source = args.store or Settings().store, ModelStore(args.source)
    if not (folder / STORE_FILE).exists():
        ModelStore.begin(folder, source, args.name)
        print(f"{args.name}: the first model and the default of {folder}, a new store")
        return 0
    store = ModelStore(folder)
    store.add(source, args.name)
    print(f"{args.name}: added to {store.folder}; the default is still {store.index.default}")
    return 0


def _default(args: argparse.Namespace) -> int:
    from service.store import ModelStore

    store = ModelStore(args.store or Settings().store)
    store.set_default(args.name)
    print(f"{args.name}: the default of {store.folder}; a running service takes it up on SIGHUP")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="limpid", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run the HTTP service; settings come from LIMPID_* variables")
    serve.add_argument("--host", help="address to listen on")
    serve.add_argument("--port", type=int, help="port to listen on, 0 for any")
    serve.set_defaults(run=_serve)
    files = argparse.ArgumentParser(add_help=False)
    files.add_argument("inputs", nargs="+", metavar="IN", help="files, folders, patterns, or - for standard input")
    files.add_argument("-o", "--output", metavar="OUT", help="a folder, a file's name, or -; else beside each input")
    files.add_argument("--force", action="store_true", help="overwrite files that exist")
    remote = argparse.ArgumentParser(add_help=False)
    remote.add_argument("--url", help="use the server there, not this machine")
    remote.add_argument("--api-key", help="for the server, else LIMPID_API_KEY")
    remote.add_argument(
        "--deadline", type=positive(float), help="seconds that the server has for a file, 60 by default"
    )
    compress = commands.add_parser("compress", help="photos to bitstreams", parents=[files, remote])
    size = compress.add_mutually_exclusive_group()
    size.add_argument("--rate", type=int, choices=range(1, 9), metavar="1..8", help="rate point, 4 by default")
    size.add_argument("--max-bytes", type=positive(int), metavar="N", help="best rate point of at most so many bytes")
    size.add_argument(
        "--target-bpp",
        type=positive(float, MOST_BPP),
        metavar="F",
        help="best rate point of at most so many bits per pixel",
    )
    compress.add_argument("--model", help="name of a model, see variants")
    compress.add_argument(
        "--effort",
        type=int,
        choices=range(MOST_EFFORT + 1),
        metavar=f"0..{MOST_EFFORT}",
        help="rounds of refinement: time for a better picture per bit",
    )
    compress.set_defaults(run=_compress)
    decompress = commands.add_parser("decompress", help="bitstreams to clean photos", parents=[files, remote])
    decompress.add_argument("--format", choices=[output.name.lower() for output in OutputFormat], help="png by default")
    decompress.add_argument("--quality", type=int, choices=range(1, 101), metavar="1..100", help="of a lossy format")
    decompress.set_defaults(run=_decompress)
    info = commands.add_parser("info", help="everything that bitstreams say of themselves")
    info.add_argument("inputs", nargs="+", metavar="FILE.lmp", help="files, folders, patterns, or -")
    info.add_argument("--json", action="store_true", help="one JSON object a line")
    info.set_defaults(run=_info)
    compare = commands.add_parser("compare", help="a photo beside its bitstream, in figures", parents=[remote])
    compare.add_argument("photo", type=Path, metavar="IN.png", help="what was compressed, or the clean original")
    compare.add_argument("bitstream", type=Path, metavar="FILE.lmp")
    compare.set_defaults(run=_compare)
    variants = commands.add_parser("variants", help="the models of the store and what was measured of them")
    variants.set_defaults(run=_variants)
    store = commands.add_parser("store", help="look after a model store")
    actions = store.add_subparsers(dest="action", required=True)
    verify = actions.add_parser("verify", help="check digests and known answers of every model")
    add = actions.add_parser("add", help="copy a model of another store, checked first; into an empty folder too")
    add.add_argument("source", type=Path, help="folder of the other store")
    add.add_argument("name", help="name of the model")
    default = actions.add_parser("default", help="choose the model for requests that name none")
    default.add_argument("name", help="name of the model")
    for action, run in ((verify, _verify), (add, _add), (default, _default)):
        action.add_argument("--store", type=Path, help="folder of the store, else LIMPID_STORE")
        action.set_defaults(run=run)
    return parser


def _variable(place: tuple[int | str, ...]) -> str:
    """The environment variable of a setting."""
    return f"LIMPID_{place[0]}".upper() if place else "LIMPID_*"


def _shown(error: UnicodeError) -> tuple[str | bytes, int]:
    """The names of files may be any bytes, which go out as they are, or letters that a terminal lacks."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 1 where something failed, which was printed; 130 after an interrupt. Wrong usage exits: 2.
    """
    closed = sys.stdout is None  # as under some daemons
    sys.stdout, sys.stderr = (one or Path(os.devnull).open("w") for one in (sys.stdout, sys.stderr))  # noqa: SIM115
    args = _parser().parse_args(argv)
    args.output_is_closed = closed
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("limpid", _shown)
        sys.stdout.reconfigure(errors="limpid")
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except ValidationError as error:
        for wrong in error.errors():
            print(f"limpid: {_variable(wrong['loc'])}: {wrong['msg']}, got {wrong['input']!r}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read standard output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ERRORS as error:
        print(f"limpid: {_words(error, None)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
