"""Files: which ones a command reads and writes, and writing one whole or not at all. Knows no images."""

from __future__ import annotations

import glob
import mimetypes
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PIPE = "-"
"""Standard input or output in place of a file's name."""

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".bmp")
"""Of the files in a folder that are taken for photos."""


def write_whole(path: Path, data: bytes, *, overwrite: bool = True, modified: int | None = None) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part, whatever happens meanwhile.

    A link is followed, and a pipe or a device is written to, not replaced.

    Args:
        modified: the time that it shall have been modified at, in nanoseconds; else now.

    Raises:
        FileExistsError: it exists and may not be overwritten.
    """
    if overwrite and path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = path.resolve()
    new = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        with new.open("wb") as file:
            with suppress(OSError):  # a name that is free, a file system whose modes nobody changes
                shutil.copymode(path, new)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if modified is not None:
            os.utime(new, ns=(modified, modified))
        if not overwrite:
            _claim(path, new)
        new.replace(path)
        _settle(path.parent)
    finally:
        new.unlink(missing_ok=True)


def _settle(folder: Path) -> None:
    """Let the names in a folder survive a power cut, where that can be had; the file's own bytes are on the disk."""
    with suppress(OSError, AttributeError):  # a folder that may not be read, a system without such handles
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _claim(path: Path, new: Path) -> None:
    """Take a name that must be free: a hard link is refused where the name is taken, even since a moment ago."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists, --force overwrites it") from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(f"{path} exists, --force overwrites it") from None


@dataclass(frozen=True)
class Pair:
    """One file to read and the one to write; None stands for standard input or output."""

    source: Path | None
    target: Path | None


def sources(inputs: Sequence[str], takes: Iterable[str]) -> list[Path | None]:
    """The files that the arguments mean, see `pair_up`; None for standard input.

    Raises:
        ValueError: nothing to read, or a pipe among files.
    """
    return [source for source, _ in _find(inputs, takes)]


def pair_up(inputs: Sequence[str], output: str | None, *, takes: Iterable[str], gives: str) -> list[Pair]:
    """Decide which files are read and where each result goes.

    Args:
        inputs: files, folders (every file below them that ends in one of `takes`), glob patterns (`**` reaches into
            folders), or `-` alone for standard input.
        output: a folder; a file's name that ends in something, for one input alone; `-` for standard output; or None:
            beside each input, and standard output for standard input.
        takes: endings of files to pick from folders, such as `.lmp`.
        gives: ending of the results. The results of a folder's files keep their places below it; those of files that
            differ in nothing but their ending, such as a.jpg and a.png, keep that too: a.jpg.lmp and a.png.lmp.

    Raises:
        ValueError: nothing to read, one place for several results, or a pipe among files; or a name that is empty.
    """
    if output == "":
        raise ValueError("expected a name for the output, got an empty one")
    found = _find(inputs, takes)
    (first, _), *others = found
    if first is None:
        if output in (None, PIPE):
            return [Pair(None, None)]
        if is_folder(str(output)) or str(output).endswith(os.sep):
            raise ValueError(f"expected the name of a file for what comes from standard input, {output} is a folder")
        return [Pair(None, Path(str(output)))]
    if output == PIPE:
        if others:
            raise ValueError(f"expected one input for standard output, got {len(found)}")
        return [Pair(first, None)]
    unfit = [source for source, _ in found if source and glob.has_magic(str(source)) and not source.exists()]
    if unfit and output and names_a_file(output):
        raise ValueError(f"found no file that fits {unfit[0]}")
    if output and not others and names_a_file(output) and not is_folder(inputs[0]):
        return [Pair(first, Path(output))]
    pairs: list[Pair] = []
    taken: dict[Path, Path] = {}
    files = [(source, Path(output) / below if output else source) for source, below in found if source]
    wanted = Counter(place.with_suffix(gives) for place in {place for _, place in files})
    for source, place in files:
        target = place.with_suffix(gives)
        if wanted[target] > 1:
            target = place.with_name(f"{place.name}{gives}")
        if target in taken:
            raise ValueError(f"both {taken[target]} and {source} would become {target}; give them in two calls")
        taken[target] = source
        pairs.append(Pair(source, target))
    return pairs


def names_a_file(output: str) -> bool:
    """Whether this is taken for a file's name where a folder could stand too: it ends in something and is no folder."""
    return bool(Path(output).suffix) and not output.endswith(os.sep) and not is_folder(output)


def is_folder(name: str) -> bool:
    """False also for what cannot be looked at; whoever reads it hears why."""
    return bool(name) and os.path.isdir(name)


def overlooked(inputs: Sequence[str], takes: Iterable[str], images: bool = False) -> list[tuple[Path, str]]:
    """What of the folders among `inputs` is not picked, and why: linked folders, folders with nothing to pick in them,
    and with `images` those of other endings, by their names."""
    endings = frozenset(takes)
    listed = ", ".join(sorted(endings))
    left_out: list[tuple[Path, str]] = []
    for text in dict.fromkeys(filter(is_folder, inputs)):
        if len(inputs) > 1 and not _found(text, endings):  # one alone is refused
            left_out.append((Path(text), f"it holds no {listed}"))
        for folder, folders, files in os.walk(text):
            others = (Path(folder, name) for name in files if Path(name).suffix.lower() not in endings)
            pictures = [one for one in others if (mimetypes.guess_type(one.name)[0] or "").startswith("image/")]
            left_out += [(one, f"of a folder only {listed} are taken") for one in pictures if images]
            links = [one for name in folders if os.path.islink(one := Path(folder, name))]
            left_out += [(one, "is a linked folder") for one in links]
    return sorted(left_out)


def _find(inputs: Sequence[str], takes: Iterable[str]) -> list[tuple[Path | None, Path]]:
    if PIPE in inputs:
        if len(inputs) > 1:
            raise ValueError("expected - for standard input alone, got it among files")
        return [(None, Path())]
    endings = frozenset(takes)
    each = {text: _found(text, endings) for text in inputs}
    if not any(each.values()):
        raise ValueError(f"found no {', '.join(sorted(endings))} in {', '.join(inputs)}")
    for text, found in each.items():
        if not found and not is_folder(text):  # a pattern that nothing fits: no such file, as reading it says
            found.append((Path(text), Path(Path(text).name)))
    return list(dict.fromkeys(pair for found in each.values() for pair in found))


def _found(text: str, takes: frozenset[str]) -> list[tuple[Path, Path]]:
    """The files that one argument means, each with its place below the folder that was named.

    A folder below it that cannot be read stands for its files, so that whoever reads it hears why.
    """
    if not text:  # a shell's variable that is not set; to Path it is the folder that one is in
        raise ValueError("expected the name of a file or folder, got an empty one")
    path = Path(text)
    if is_folder(text):
        unread: list[OSError] = []
        below = (Path(folder, name) for folder, _, names in os.walk(text, onerror=unread.append) for name in names)
        files = (one for one in below if one.suffix.lower() in takes)
        found = [one for one in files if os.path.isfile(one) or not os.path.exists(one)]  # pipes are passed over
        found += [Path(error.filename) for error in unread]
        return [(one, one.relative_to(path) if one != path else Path(path.resolve().name)) for one in sorted(found)]
    if not os.path.exists(text) and glob.has_magic(text):
        return [(Path(one), Path(Path(one).name)) for one in sorted(glob.glob(text, recursive=True))
                if Path(one).is_file()]  # fmt: skip
    return [(path, Path(path.name))]
