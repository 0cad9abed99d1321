"""Uploads to sRGB arrays and back. Knows Pillow, knows no HTTP.

An upload of any supported kind becomes (H, W, 3) uint8 sRGB: EXIF orientation applied, the embedded ICC profile
converted, 16 bits made 8 (grey rounded, colour cut), CMYK, grey and palette expanded, transparency laid over white, the
first frame of an animation. Limits are checked from the header, before a pixel is allocated; how a file is built is
looked at before that (`service/structure.py`).
"""

from __future__ import annotations

import io
import warnings
import zlib
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from service.structure import canvas, check_structure

Photo = NDArray[np.uint8]

INPUT_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP")

Image.MAX_IMAGE_PIXELS = None  # `read_photo` has its own limit and applies it before decoding

# Bytes of a colour profile as well, and those of printers have more than Pillow's one mebibyte.
PngImagePlugin.MAX_TEXT_CHUNK = 2**22

warnings.filterwarnings("ignore", module=r"PIL\.")  # of tags, say: an upload shall not fill the log

_SRGB = ImageCms.createProfile("sRGB")

_MOST_EXIF = 2**20
"""Bytes; cameras write up to some 100 kB."""

_MOST_TAGS = 1000
"""Of a colour profile; lcms refuses one with more than a hundred."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image of each EXIF orientation upright."""


class ImageError(ValueError):
    """The upload cannot become a photo."""


class NotAnImage(ImageError):
    """The bytes are of no supported image format."""


class CorruptImage(ImageError):
    """The bytes begin like an image but cannot be decoded."""


class TooManyPixels(ImageError):
    """The photo is larger than the limit."""


class TooLargeForFormat(ImageError):
    """A side of the photo is longer than the output format can hold."""


_AVIF_SPEED, _AVIF_FASTEST, _AVIF_PIXELS = 8, 9, 4_000_000
"""Pillow's speed of 6 takes 0.8 s for 768x512, several times what decompressing takes, and nothing can stop it; 8 takes
half of that for 0.2 dB. 9, for more pixels than these, takes 0.06 s for 0.75 dB and 10% more bytes."""


class OutputFormat(Enum):
    """A format that photos are returned in.

    Its name is Pillow's. Its media type, the default quality of a lossy one, and the longest side in pixels that it
    can hold.
    """

    PNG = ("image/png", None, 2**31 - 1)
    JPEG = ("image/jpeg", 90, 65_500)
    WEBP = ("image/webp", 85, 16_383)
    AVIF = ("image/avif", 75, 32_768)  # what libavif reads; it writes longer ones

    def __init__(self, media_type: str, quality: int | None, longest: int) -> None:
        self.media_type, self.default_quality, self.longest = media_type, quality, longest


def read_photo(data: bytes, max_pixels: int) -> Photo:
    """Decode an upload to (H, W, 3) uint8 sRGB.

    Raises:
        NotAnImage: none of the supported formats.
        TooManyPixels: width times height exceeds max_pixels; nothing was decoded.
        CorruptImage: the file is cut short or damaged, or would cost far more work than its photo is worth.
        MemoryError: the machine has too little for it.
    """
    try:
        check_structure(data)
    except ValueError as error:
        raise CorruptImage(str(error)) from None
    if announced := canvas(data):
        check_size(*announced, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=INPUT_FORMATS)
    except UnidentifiedImageError as error:
        if (name := _begins_like(data)) and not _is_heic(data):
            raise CorruptImage(f"the {name} file is damaged or cut short") from error
        what = "a HEIC photo" if _is_heic(data) else f"{len(data)} bytes of something else"
        raise NotAnImage(f"expected an image ({', '.join(INPUT_FORMATS)}), got {what}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their libraries do
        raise CorruptImage(f"the image header is damaged: {error}") from error
    with image:
        try:
            _check_cost(image, max_pixels)
            image.load()
            turn = _turn_of(image)
            photo = _to_srgb(image, data[24] if image.format == "PNG" else 8)
            return photo if turn is None else np.asarray(Image.fromarray(photo).transpose(turn))
        except (ImageError, MemoryError):
            raise
        except Exception as error:
            raise CorruptImage(f"the {image.format} file is damaged: {error}") from error


def _check_cost(image: Image.Image, max_pixels: int) -> None:
    """Of decoding it, from its header.

    Raises:
        TooManyPixels: as in `read_photo`.
    """
    check_size(image.height, image.width, max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # whole tiles are allocated, be they larger than the photo
        tags, tag = image.tag_v2, ExifTags.Base
        check_size(int(tags.get(tag.TileLength, 1)), int(tags.get(tag.TileWidth, 1)), max_pixels)


def _begins_like(data: bytes) -> str | None:
    """The format whose signature the bytes bear, as Pillow's plugins know it; BMP's two letters say too little."""
    accepts = {name: Image.OPEN[name][1] for name in INPUT_FORMATS if name != "BMP"}
    return next((name for name, accept in accepts.items() if accept and accept(data[:16]) is True), None)


def _is_heic(data: bytes) -> bool:
    """Whether it is an iPhone's photo, a HEIF file (ISO 23008-12) of HEVC, by its brands."""
    size = int.from_bytes(data[:4], "big")
    brands = {data[8:12], *(data[start : start + 4] for start in range(16, min(size, 256), 4))}
    return data[4:8] == b"ftyp" and not brands.isdisjoint({b"heic", b"heix", b"hevc", b"heim", b"heis"})


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """What brings it upright, as its EXIF says.

    None where that is broken, which every viewer forgives, or so large that reading it costs more than the photo.
    """
    if len(image.info.get("exif", b"")) > _MOST_EXIF:
        return None
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    except MemoryError:
        raise
    except Exception:  # Pillow's parser raises whatever the damage leads to
        return None


def check_size(height: int, width: int, max_pixels: int) -> None:
    """A photo is worked on with its sides rounded up, in part to 64, which makes a line 64 times as large: that counts.

    Raises:
        TooManyPixels: it is larger than the limit, or rounded up over an eighth larger.
    """
    if height * width > max_pixels:
        raise TooManyPixels(f"expected at most {max_pixels} pixels, got {width}x{height}")
    padded = -(-height // 64) * -(-width // 64) * 4096
    if padded > max_pixels + max_pixels // 8 + 2**16:
        raise TooManyPixels(f"expected at most {max_pixels} pixels, got {width}x{height}, {padded} in blocks of 64x64")


def _to_srgb(image: Image.Image, depth: int) -> Photo:
    """`depth`: bits of a PNG's sample. They are eight by now, but Pillow leaves the transparent level as it was."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit_grey(image)
    key = image.info.get("transparency")
    if isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if isinstance(key, int) and image.mode == "L" and depth < 8:
        image.info["transparency"] = key * 255 // (2**depth - 1)
    if key is not None and image.mode in ("1", "L"):
        image = image.convert("LA")
    elif image.mode == "P" or key is not None:
        image = image.convert("RGB" if key is None else "RGBA")
    if image.mode == "La":  # multiplied by its transparency; there is no way from it to RGBA
        image = image.convert("LA")
    if image.mode in ("LA", "RGBA", "RGBa", "PA"):
        grey = image.mode == "LA"
        if image.mode != "RGBA":
            image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(_rgb(_convert_profile(image.convert("L" if grey else "RGB"), profile)), mask=image.getchannel("A"))
        return np.asarray(white)
    return np.asarray(_rgb(_convert_profile(image, profile)))


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """Grey of more bits to 8, rounded; float grey is taken as [0, 1]. Some rows at a time, for memory's sake.

    Integers that may be negative are taken for 16 bits, whatever they have room for: that is how programs use them. A
    grey level that PNG calls transparent becomes white, and a TIFF whose zero is white is turned round.
    """
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    negative = tags.get(ExifTags.Base.PhotometricInterpretation) == 0 and image.mode != "F"
    key = image.info.get("transparency")
    values = np.asarray(image)
    bits = 16
    if tags.get(ExifTags.Base.SampleFormat, (1,))[0] == 1:  # integers from zero on, also where it says nothing
        bits = tags.get(ExifTags.Base.BitsPerSample, (bits,))[0]
        values = values.view(np.uint32) if values.dtype == np.int32 and bits == 32 else values
    scale = 255 if image.mode == "F" else 255 / (2**bits - 1)
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, 2**18 // values.shape[1])
    for start in range(0, len(values), rows):
        some = values[start : start + rows]
        levels = np.clip(np.rint(np.nan_to_num(some.astype(np.float64)) * scale), 0, 255)
        grey[start : start + rows] = 255 - levels if negative else levels
        if isinstance(key, int):
            grey[start : start + rows][some == key] = 255
    return Image.fromarray(grey)


def _convert_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert from the embedded profile to sRGB; one that is broken or of another colour model is ignored."""
    if not profile or image.mode not in ("RGB", "L", "CMYK"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(_without_programs(profile)))
        converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    return converted if converted is not None else image


def _without_programs(profile: bytes) -> bytes:
    """A profile without its D2Bx tags (ICC.1, 9.2.34): lcms, which prefers them to tables, runs up any number of steps
    over one table of the file: 633 bytes of PNG took 170 MB, 903 took 53 s, and there is no end to it."""
    count = min(int.from_bytes(profile[128:132], "big"), _MOST_TAGS)
    head = bytearray(profile[: 132 + 12 * count])
    for at in range(132, len(head), 12):
        if head[at : at + 3] == b"D2B":
            head[at : at + 4] = b"none"
    return bytes(head) + profile[len(head) :]


def write_photo(photo: Photo, output: OutputFormat, quality: int | None = None) -> bytes:
    """Encode (H, W, 3) uint8 sRGB. quality: 1 to 100, only for lossy formats; None takes the format's default.

    Raises:
        TooLargeForFormat: a side is longer than `output.longest`.
    """
    if max(photo.shape[:2]) > output.longest:
        raise TooLargeForFormat(f"{output.media_type} holds sides up to {output.longest}, got {max(photo.shape[:2])}")
    buffer = io.BytesIO()
    image = Image.fromarray(photo)
    if output is OutputFormat.PNG:
        # Runs only: photos have nothing longer to find. 28 ms for 768x512 instead of 43, 1% larger.
        image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    else:
        options = {"subsampling": 0} if output is OutputFormat.JPEG else {}
        if output is OutputFormat.AVIF:
            options = {"speed": _AVIF_SPEED if image.width * image.height <= _AVIF_PIXELS else _AVIF_FASTEST}
        image.save(buffer, output.name, quality=quality or output.default_quality, **options)
    return buffer.getvalue()
