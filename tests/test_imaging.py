"""`service.imaging`: whatever cameras and editors write becomes upright 8-bit sRGB, or a clear error."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from model_store.images import psnr
from service.engine import Photo
from service.imaging import (
    CorruptImage,
    ImageError,
    NotAnImage,
    OutputFormat,
    TooLargeForFormat,
    TooManyPixels,
    check_size,
    read_photo,
    write_photo,
)
from tests.conftest import image_bytes

LIMIT = 1_000_000


@pytest.mark.parametrize(
    ("format", "options", "least"),
    [
        ("PNG", {}, 99), ("BMP", {}, 99), ("TIFF", {}, 99), ("TIFF", {"compression": "tiff_lzw"}, 99),
        ("WEBP", {"lossless": True}, 99), ("WEBP", {"quality": 90}, 30), ("JPEG", {"quality": 95}, 30),
        ("JPEG", {"quality": 95, "progressive": True}, 30), ("AVIF", {"quality": 90}, 30),
    ],
)  # fmt: skip
def test_every_format_is_read(parrots: Photo, format: str, options: dict[str, object], least: float) -> None:
    back = read_photo(image_bytes(parrots, format, **options), LIMIT)
    assert back.dtype == np.uint8
    assert np.array_equal(back, parrots) if least == 99 else psnr(back, parrots) > least


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(parrots: Photo, orientation: int) -> None:
    turns: dict[int, Callable[[Photo], Photo]] = {
        1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, 1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = parrots[:100, :60]
    assert np.array_equal(read_photo(image_bytes(photo, "PNG", exif=exif.tobytes()), LIMIT), turns[orientation](photo))


def test_grey_palette_and_bilevel_become_rgb(parrots: Photo) -> None:
    grey = Image.fromarray(parrots).convert("L")
    assert np.array_equal(read_photo(image_bytes(grey), LIMIT), np.asarray(grey.convert("RGB")))
    palette = Image.fromarray(parrots).quantize(64)
    assert np.array_equal(read_photo(image_bytes(palette), LIMIT), np.asarray(palette.convert("RGB")))
    bilevel = grey.convert("1")
    assert np.array_equal(read_photo(image_bytes(bilevel), LIMIT), np.asarray(bilevel.convert("RGB")))


def test_transparency_is_laid_over_white(parrots: Photo) -> None:
    alpha = np.zeros((*parrots.shape[:2], 1), np.uint8)
    alpha[:128] = 255
    back = read_photo(image_bytes(Image.fromarray(np.concatenate([parrots, alpha], 2))), LIMIT)
    assert np.array_equal(back[:128], parrots[:128])
    assert (back[128:] == 255).all()
    palette = Image.fromarray(parrots).quantize(16)
    back = read_photo(image_bytes(palette, "PNG", transparency=bytes([0] * 16)), LIMIT)
    assert (back == 255).all()


def test_sixteen_bits_are_rounded_to_eight(parrots: Photo) -> None:
    grey = np.asarray(Image.fromarray(parrots).convert("L"))
    wide = grey.astype(np.uint16) * 257
    for format in ("PNG", "TIFF"):
        back = read_photo(image_bytes(Image.fromarray(wide), format), LIMIT)
        assert np.array_equal(back[..., 0], grey)
    between = np.array([[100, 200], [257 + 100, 257 + 200]], np.uint16)
    assert read_photo(image_bytes(Image.fromarray(between), "PNG"), LIMIT)[..., 0].tolist() == [[0, 1], [1, 2]]
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in parrots.astype(np.uint16))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", parrots.shape[1], parrots.shape[0], 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(read_photo(png, LIMIT), parrots)


def test_cmyk_is_converted(parrots: Photo) -> None:
    back = read_photo(image_bytes(Image.fromarray(parrots).convert("CMYK"), "JPEG", quality=95), LIMIT)
    assert psnr(back, parrots) > 28


def linear_profile() -> bytes:
    """An ICC profile of sRGB primaries with a gamma of 1, so that ignoring it would show."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for index in range(struct.unpack_from(">I", srgb, 128)[0]):
        tag, offset, size = struct.unpack_from(">4sII", srgb, 132 + 12 * index)
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            srgb[offset : offset + size] = struct.pack(">4sII", b"curv", 0, 0).ljust(size, b"\0")
    return bytes(srgb)


def test_an_icc_profile_is_converted_to_srgb() -> None:
    grey = np.full((32, 32, 3), 55, np.uint8)  # linear light 55/255 is sRGB 128
    back = read_photo(image_bytes(grey, "PNG", icc_profile=linear_profile()), LIMIT)
    assert np.abs(back.astype(int) - 128).max() <= 1
    assert np.array_equal(read_photo(image_bytes(grey, "PNG", icc_profile=b"broken"), LIMIT), grey)


def programmed(profile: bytes, steps: int, side: int) -> bytes:
    """A profile with a D2B0 tag that looks up one table of `side`**3 mid-greys so many times."""
    count = struct.unpack_from(">I", profile, 128)[0]
    entries = [struct.unpack_from(">4sII", profile, 132 + 12 * index) for index in range(count)]
    tags = [(tag, profile[offset : offset + size]) for tag, offset, size in entries]
    table = b"clut" + bytes(4) + struct.pack(">HH", 3, 3) + bytes([side] * 3 + [0] * 13)
    table += struct.pack(">f", 0.5) * 3 * side**3
    where = struct.pack(">II", 16 + 8 * steps, len(table)) * steps
    tags.append((b"D2B0", b"mpet" + bytes(4) + struct.pack(">HHI", 3, 3, steps) + where + table))
    at, head, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, data in tags:
        head += struct.pack(">4sII", tag, at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    whole = profile[4:128] + head + body
    return struct.pack(">I", len(whole) + 4) + whole


def test_the_programs_of_a_profile_are_not_run() -> None:
    grey = np.full((1, 1, 3), 55, np.uint8)
    back = read_photo(image_bytes(grey, "PNG", icc_profile=programmed(linear_profile(), 1, 2)), LIMIT)
    assert np.abs(back.astype(int) - 128).max() <= 1  # as its curves have it
    bomb = image_bytes(grey, "PNG", icc_profile=programmed(linear_profile(), 30_000, 2))
    assert len(bomb) < 3000
    begun = time.monotonic()
    assert np.array_equal(read_photo(bomb, LIMIT), back)
    assert time.monotonic() - begun < 10  # it took a minute


def test_a_profile_of_more_than_a_megabyte_counts() -> None:
    profile = linear_profile()
    long = struct.pack(">I", len(profile) + 2**21) + profile[4:] + bytes(2**21)
    back = read_photo(image_bytes(np.full((1, 1, 3), 55, np.uint8), "PNG", icc_profile=long), LIMIT)
    assert np.abs(back.astype(int) - 128).max() <= 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_image_is_a_clear_error(parrots: Photo, format: str, share: float) -> None:
    data = image_bytes(parrots, format)
    with pytest.raises(CorruptImage, match="damaged"):
        read_photo(data[: int(share * len(data))], LIMIT)


def test_text_and_unsupported_formats_are_not_images(parrots: Photo) -> None:
    for data in (b"hello", b"{}", b"<svg/>", b"%PDF-1.4", image_bytes(parrots, "GIF"), image_bytes(parrots, "PPM")):
        with pytest.raises(NotAnImage, match="JPEG, PNG"):
            read_photo(data, LIMIT)


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1", b"mif1\0\0\0\0mif1heix"])
def test_an_iphones_photo_is_named(brands: bytes) -> None:
    data = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(1000)
    with pytest.raises(NotAnImage, match="got a HEIC photo"):
        read_photo(data, LIMIT)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(10_000))) + png_chunk(b"IEND", b"")


def test_a_bomb_is_refused_from_its_header() -> None:
    with pytest.raises(TooManyPixels, match="100000x100000"):
        read_photo(bomb(100_000, 100_000), LIMIT)
    with pytest.raises(TooManyPixels):
        read_photo(bomb(1001, 1000), LIMIT)


def tiff_of(entries: dict[int, int], pixels: bytes, shapes: dict[int, tuple[int, int]] | None = None) -> bytes:
    """A TIFF whose pixels begin at its eighth byte; `shapes` says of an entry its type and count, else a long."""
    rows = (struct.pack("<HHII", tag, *(shapes or {}).get(tag, (4, 1)), value) for tag, value in entries.items())
    directory = struct.pack("<H", len(entries)) + b"".join(rows) + bytes(4)
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + directory


def test_a_tile_larger_than_its_photo_is_refused_unread() -> None:
    pixels = zlib.compress(bytes(8192 * 8192))
    entries = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: 8192, 323: 8192, 324: 8, 325: len(pixels)}
    tiled = tiff_of(entries, pixels)
    assert read_photo(tiled, 8192 * 8192).shape == (64, 64, 3)
    with pytest.raises(TooManyPixels, match="8192x8192"):
        read_photo(tiled, LIMIT)


def scans_added(progressive: bytes, count: int) -> bytes:
    """The last scan of a progressive JPEG so many times more."""
    last, end = progressive.rindex(b"\xff\xda"), progressive.rindex(b"\xff\xd9")
    return progressive[:end] + progressive[last:end] * count + progressive[end:]


def test_a_jpeg_of_ever_more_scans_is_refused_unread(parrots: Photo) -> None:
    progressive = image_bytes(parrots, "JPEG", progressive=True)
    video = b"\xff\xda" * 1000  # as phones append it
    assert np.array_equal(read_photo(progressive + video, LIMIT), read_photo(progressive, LIMIT))
    assert read_photo(scans_added(progressive, 50), LIMIT).shape == parrots.shape
    many = scans_added(progressive, 100)
    last = progressive.rindex(b"\xff\xda")
    no_end = b"\xff\xfe\x00\x04\xff\xd9"  # within a comment
    no_length = b"\xff\xdd\x00\x04\x00\x01", b"\xff\x02\xff\xff"  # of a marker that libjpeg passes over
    for bomb in (many, many[:2] + no_end + many[2:], many[:last] + b"".join(no_length) + many[last:]):
        with pytest.raises(CorruptImage, match="at most 100 scans"):
            read_photo(bomb, LIMIT)
    with pytest.raises(CorruptImage, match="10000 markers"):
        read_photo(progressive[:2] + b"\xff\xfe\x00\x02" * 10_000 + progressive[2:], LIMIT)


@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])  # an end before the first scan, which Pillow passes over
def test_a_jpeg_of_ever_more_segments_is_refused_unread(parrots: Photo, end: bytes) -> None:
    jpeg = image_bytes(parrots, "JPEG")
    exif = b"\xff\xe1" + struct.pack(">H", 8) + b"Exif\0\0"
    photoshop = b"\xff\xed" + struct.pack(">H", 65_535) + b"Photoshop 3.0\0" + bytes(65_519)
    comment = b"\xff\xfe" + struct.pack(">H", 65_535) + bytes(65_533)
    assert read_photo(jpeg[:2] + 4 * exif + 5 * photoshop + 300 * comment + jpeg[2:], LIMIT).shape == parrots.shape
    bombs = {
        5 * exif: "4 Exif segments",
        70 * photoshop: "4194304 of Photoshop",
        b"\xff" * 70_000: "65536 bytes of fill",
    }
    for segments, said in bombs.items():
        with pytest.raises(CorruptImage, match=said):
            read_photo(jpeg[:2] + end + segments + jpeg[2:], LIMIT)


def test_a_png_of_ever_more_chunks_is_refused_unread(parrots: Photo) -> None:
    png = image_bytes(parrots, "PNG")
    for name in (b"abCd", b"IDAT"):
        chunk = png_chunk(name, b"")
        assert read_photo(png[:33] + 1000 * chunk + png[33:], LIMIT).shape == parrots.shape
        with pytest.raises(CorruptImage, match="10000 chunks"):
            read_photo(png[:33] + 20_000 * chunk + png[33:], LIMIT)
    profile = png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(100)))
    assert read_photo(png[:33] + profile + png[33:], LIMIT).shape == parrots.shape
    with pytest.raises(CorruptImage, match="one profile"):
        read_photo(png[:33] + 2 * profile + png[33:], LIMIT)


def test_the_first_frame_of_a_long_animation_is_a_photo(parrots: Photo) -> None:
    frames = [Image.fromarray(np.full((4, 4, 3), index % 251, np.uint8)) for index in range(5200)]
    animation = image_bytes(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert animation.count(b"fdAT") > 5000
    assert (read_photo(animation, LIMIT) == 0).all()


@pytest.mark.parametrize(("order", "big"), [("<", False), ("<", True), (">", False)])  # Pillow knows no other
def test_a_tiff_of_ever_more_strips_is_refused_unread(order: str, big: bool) -> None:
    def tiff(strips: int, more: int = 0) -> bytes:
        """64x64 pixels, the first of many offsets of a byte each being the one that counts."""
        at = 16 if big else 8
        offsets = bytes([at]) * strips + bytes(4096)
        tags = {256: 64, 257: 64, 258: 8, 259: 1, 262: 1, 273: at, 277: 1, 278: 64, 279: 4096}
        number, entry = ("Q", "HHQQ") if big else ("H", "HHII")
        rows = b"".join(
            struct.pack(f"{order}{entry}", tag, 1 if tag == 273 else 4, strips if tag == 273 else 1, value)
            for tag, value in tags.items()
        ) + more * struct.pack(f"{order}{entry}", 60_000, 4, 1, 0)
        mark = b"II" if order == "<" else b"MM"
        head = (
            struct.pack(f"{order}HHHQ", 43, 8, 0, at + len(offsets))
            if big
            else struct.pack(f"{order}HI", 42, at + len(offsets))
        )
        return mark + head + offsets + struct.pack(f"{order}{number}", len(tags) + more) + rows + bytes(8)

    assert read_photo(tiff(64), LIMIT).shape == (64, 64, 3)
    with pytest.raises(CorruptImage, match="at most 131072 strips or tiles, got 200000"):
        read_photo(tiff(200_000), LIMIT)
    with pytest.raises(CorruptImage, match="at most 4096 entries, got 5009"):
        read_photo(tiff(64, 5000), LIMIT)


def test_numbers_without_end_are_not_read(parrots: Photo) -> None:
    """Each of a TIFF's tags, or of the EXIF of other formats, is decoded in Python."""
    for head in (b"II\x2b\0", b"MM\0\x2b"):
        with pytest.raises(CorruptImage):  # a directory beyond any file
            read_photo(head + b"\x08\0\0\0" + b"\xff" * 8, LIMIT)
    numbers = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 282, 5, 300_000, 26, 0) + bytes(2_400_000)
    with pytest.raises(CorruptImage, match="at most 262144 numbers in an entry of a TIFF, got 300000"):
        read_photo(numbers, LIMIT)
    exif = Image.Exif()
    exif[0x112] = 6
    assert read_photo(image_bytes(parrots, "PNG", exif=exif), LIMIT).shape[:2] == parrots.shape[1::-1]
    exif[0x10E] = "x" * 2**20
    assert read_photo(image_bytes(parrots, "PNG", exif=exif), LIMIT).shape == parrots.shape


def linear_grey_profile() -> bytes:
    """A grey profile (ICC.1:2001-04) of a linear tone curve and the white of D50."""
    white = struct.pack(">4s4x3i", b"XYZ ", 63_190, 65_536, 54_061)
    tags = {b"wtpt": white, b"kTRC": struct.pack(">4s4xI", b"curv", 0)}
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table, body = table + struct.pack(">4sII", name, at + len(body), len(data)), body + data
    head = struct.pack(">I4sI4s4s4s12x4s", at + len(body), b"none", 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    return head + bytes(28) + white[8:] + bytes(48) + table + body


def test_a_grey_profile_counts_under_transparency_too() -> None:
    grey = np.full((2, 2), 128, np.uint8)
    with_alpha = np.stack([grey, np.full_like(grey, 255)], -1)
    plain, keyed, layered = (
        read_photo(image_bytes(pixels, "PNG", icc_profile=linear_grey_profile(), **options), LIMIT)
        for pixels, options in ((grey, {}), (grey, {"transparency": 3}), (with_alpha, {}))
    )
    assert plain[0, 0, 0] > 180
    assert np.array_equal(plain, keyed)
    assert np.array_equal(plain, layered)


def test_a_run_length_bmp_of_ever_more_runs_is_refused_unread() -> None:
    def bmp(runs: bytes) -> bytes:
        header = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, len(runs), 0, 0, 256, 0)
        palette = b"".join(struct.pack("<BBBB", grey, grey, grey, 0) for grey in range(256))
        offset = 14 + len(header) + len(palette)
        return struct.pack("<2sIHHI", b"BM", offset + len(runs), 0, 0, offset) + header + palette + runs

    rows = b"\x08\x80\0\0" * 8 + b"\0\1"
    assert (read_photo(bmp(rows), LIMIT) == 128).all()
    with pytest.raises(CorruptImage, match="run-length encoded BMP"):
        read_photo(bmp(b"\0\2\0\0" * 50_000 + rows), LIMIT)


def test_a_webp_is_refused_by_the_canvas_it_announces() -> None:
    side = (16_000 - 1).to_bytes(3, "little")
    webp = struct.pack("<4sI4s4sI", b"RIFF", 30, b"WEBP", b"VP8X", 10) + bytes(4) + side + side
    with pytest.raises(TooManyPixels, match="16000x16000"):
        read_photo(webp, LIMIT)


def test_an_upload_writes_no_warnings() -> None:
    tags = b"".join(struct.pack("<HHII", 60_000 + index, 2, 2**31, 8) for index in range(50))
    entries = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items()) + tags
    tiff = struct.pack("<2sHI", b"II", 42, 72) + bytes(64) + struct.pack("<H", len(entries) + 50) + rows + bytes(4)
    script = (
        "import sys; from service.imaging import read_photo; print(read_photo(sys.stdin.buffer.read(), 10**6).shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], input=tiff, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"(8, 8, 3)\n", b"")


def keyed_png(depth: int, colour_type: int, key: tuple[int, ...], pixels: bytes) -> bytes:
    """Two pixels side by side, and a level or colour that is transparent."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0))
    transparent = png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    body = png_chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + transparent + body


@pytest.mark.parametrize(("depth", "pixels", "key"), [(1, 0b01000000, 0), (2, 0b01100000, 1), (4, 0b10001111, 8)])
def test_a_transparent_level_of_few_bits_is_white(depth: int, pixels: int, key: int) -> None:
    shown = {1: 255, 2: 170, 4: 255}[depth]
    assert read_photo(keyed_png(depth, 0, (key,), bytes([pixels])), LIMIT)[0, :, 0].tolist() == [255, shown]


def test_a_transparent_level_of_sixteen_bits_is_white() -> None:
    png = partial(keyed_png, 16)
    grey = read_photo(png(0, (30_000,), struct.pack(">2H", 30_000, 25_700)), LIMIT)
    assert grey[0, :, 0].tolist() == [255, 100]
    colour = read_photo(png(2, (0x1234, 0x3456, 0x5678), struct.pack(">6H", 0x1234, 0x3456, 0x5678, 0, 0, 0)), LIMIT)
    assert colour[0].tolist() == [[255, 255, 255], [0, 0, 0]]
    dark = read_photo(png(2, (0x34, 0, 0), struct.pack(">6H", 0x34, 0, 0, 0x3434, 0, 0)), LIMIT)
    assert dark[0].tolist() == [[255, 255, 255], [0x34, 0, 0]]


@pytest.mark.parametrize(
    ("bits", "form", "pixels", "levels"),
    [
        (12, 1, bytes([0xFF, 0xF8, 0x00]), [255, 128]), (16, 1, struct.pack("<2H", 65_535, 25_700), [255, 100]),
        (32, 1, struct.pack("<2I", 2**32 - 1, 2**30), [255, 64]), (32, 2, struct.pack("<2i", 65_535, -7), [255, 0]),
        (32, 3, struct.pack("<2f", 1, 0.5), [255, 128]),
    ],
)  # fmt: skip
def test_grey_tiffs_of_other_depths_come_to_eight_bits(bits: int, form: int, pixels: bytes, levels: list[int]) -> None:
    entries = {256: 2, 257: 1, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(pixels), 339: form}
    assert read_photo(tiff_of(entries, pixels), LIMIT)[0, :, 0].tolist() == levels


@pytest.mark.parametrize(("extra", "grey"), [(1, 64), (2, 128)])
def test_a_grey_tiff_is_laid_over_white_whether_multiplied_by_its_alpha_or_not(extra: int, grey: int) -> None:
    two = 8 | 8 << 16  # of BitsPerSample, whose two shorts lie in the entry itself
    entries = {256: 1, 257: 1, 258: two, 259: 1, 262: 1, 273: 8, 277: 2, 278: 1, 279: 2, 338: extra}
    assert read_photo(tiff_of(entries, bytes([grey, 128]), {258: (3, 2)}), LIMIT)[0, 0].tolist() == [191] * 3


def test_a_tiff_whose_zero_is_white_is_no_negative() -> None:
    entries = {256: 2, 257: 1, 258: 16, 259: 1, 262: 0, 273: 8, 277: 1, 278: 1, 279: 4}
    assert read_photo(tiff_of(entries, struct.pack("<2H", 0, 65_535)), LIMIT)[0, :, 0].tolist() == [255, 0]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_mutated_images_are_photos_or_image_errors(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP"]))
    photo = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    mutated = bytearray(image_bytes(photo, format))
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(mutated) - 1), st.integers(0, 255)), min_size=1, max_size=6)
    ):
        mutated[position] = value
    try:
        back = read_photo(bytes(mutated), 10_000)
    except ImageError:
        return
    assert back.ndim == 3
    assert back.dtype == np.uint8


@pytest.mark.parametrize("output", list(OutputFormat))
def test_photos_are_written_in_every_format(parrots: Photo, output: OutputFormat) -> None:
    data = write_photo(parrots, output)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == output.name
    back = read_photo(data, LIMIT)
    assert np.array_equal(back, parrots) if output is OutputFormat.PNG else psnr(back, parrots) > 30
    if output is not OutputFormat.PNG:
        assert len(write_photo(parrots, output, 20)) < len(data)


@pytest.mark.parametrize(("side", "speed"), [(64, 8), (2064, 9)])
def test_avif_is_written_in_a_time_that_requests_have(monkeypatch: pytest.MonkeyPatch, side: int, speed: int) -> None:
    options: dict[str, object] = {}
    monkeypatch.setattr(Image.Image, "save", lambda self, buffer, name, **given: options.update(given))
    write_photo(np.zeros((side, side, 3), np.uint8), OutputFormat.AVIF)
    assert options["speed"] == speed


def test_a_broken_exif_is_ignored(parrots: Photo) -> None:
    data = image_bytes(parrots, "JPEG", exif=b"Exif\0\0junkjunk")
    assert read_photo(data, 10**6).shape == parrots.shape


def test_a_line_counts_as_the_blocks_it_fills() -> None:
    check_size(6000, 8333, 50_000_000)
    check_size(1, 1, 100)
    with pytest.raises(TooManyPixels, match="in blocks of 64x64"):
        check_size(1, 40_000_000, 50_000_000)


def test_a_format_says_what_it_cannot_hold() -> None:
    for output in (OutputFormat.WEBP, OutputFormat.JPEG, OutputFormat.AVIF):
        longest = np.zeros((2, output.longest, 3), np.uint8)
        assert read_photo(write_photo(longest, output), 10**7).shape == longest.shape
    with pytest.raises(TooLargeForFormat, match="16383"):
        write_photo(np.zeros((1, 16_384, 3), np.uint8), OutputFormat.WEBP)
