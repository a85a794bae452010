"""Opens image files: the only place that does, both for checking them and for the model.

Two parsers may see two different pictures in one file, so that one picture is checked and the other is shown to the
model. So formats, limits and decoding are the same for all. The cost of a file is bounded: pixels are counted in the
header, before any is decoded, and a clock limits the work on everything else.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, WebPImagePlugin  # noqa: F401  # else all formats load

from deployments.messages import MAX_ASPECT
from deployments.spec import ItemError
from deployments.tiff_tags import count_numbers

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

MAX_MEGAPIXELS = 50.0
"""Pillow keeps 4 bytes per pixel, and as many again while it turns a picture or puts it on white. Decoders need more.
Measured at this limit: 190 MB for a JPEG, 470 for a progressive one, 560 for a PNG or TIFF with transparency, 940 for
such a WebP. The 13,000 x 13,000 pixels that fit in a file of a few kB would take 3 GB."""

HEADER_CPU_S, DECODE_CPU_S = 1.0, 10.0
"""Limits on this thread's CPU time. At the limit of pixels, a 12 MB JPEG took 0.9 s and no other format took more.
Small files with thousands of scans or segments, or with inflated profiles, took minutes."""
BLOCK_BYTES = 1024
"""Bytes that a JPEG decoder gets at once. The clock is checked in between, and ten bytes can hold a scan over all
pixels. Larger blocks were no faster."""
MAX_TAG_NUMBERS = 100_000
"""Most numbers in all tags of a TIFF. Pillow makes a Python object of 60 to 200 bytes of each. A picture of 50
megapixels has some ten thousand strips or tiles at most."""
MAX_EXIF_BYTES = 2**20
"""Largest EXIF block that is searched for the orientation. Cameras write at most 64 kB."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn a picture upright, by EXIF orientation."""


class ImageError(ItemError):
    """A file is not an image, or not one that Dure accepts. The message says what to change."""

    def __init__(self, message: str, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


@dataclass(frozen=True)
class Header:
    """What the file's header says."""

    media_type: str
    extension: str
    width: int
    height: int
    """Width and height are as stored, before the picture is turned upright."""


def read_header(content: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Header:
    """Read the header without decoding a pixel. Raises ImageError, also if the image is too large to decode."""
    with _readable():
        image = _open(content, max_megapixels)
        kind = "JPEG" if image.format == "MPO" else image.format or ""  # a JPEG followed by other pictures
        return Header(Image.MIME[kind], kind.lower(), image.width, image.height)


def decode(content: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Decode a picture: upright, in 8-bit RGB, on white where transparent; the first frame of an animation.

    Raises ImageError if it can't be decoded to the end, or is too large. MAX_MEGAPIXELS always holds.
    """
    with _readable():
        image = _open(content, max_megapixels)
        if image.format == "PNG" and image.mode == "RGB" and image.tile[0].args == "RGB;16B":
            picture = _deep_rgb(image, _open(content, max_megapixels))
        else:
            _mend_transparency(image)
            if image.format in ("JPEG", "MPO"):
                image.decodermaxblock = BLOCK_BYTES
            image.load()
            picture = _rgb(image)
        return _upright(picture, _orientation(image))


class _File(io.BytesIO):
    """A file that stops being readable once decoding has taken too much CPU time."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.allow(HEADER_CPU_S)

    def allow(self, cpu_s: float) -> None:
        self._until = time.thread_time() + cpu_s

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._until:
            raise ImageError("the image takes too long to decode; save it again", too_large=True)
        return super().read(size)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"the image has too many pixels: at most {MAX_MEGAPIXELS:g} million", too_large=True
        ) from error
    except Exception as error:  # a damaged file may make Pillow fail in any way
        raise ImageError(f"the image can't be read; send one of {', '.join(FORMATS)}") from error


def _open(content: bytes, max_megapixels: float) -> ImageFile.ImageFile:
    """Open an image and check its header. What is returned may be decoded."""
    if content.startswith((b"II", b"MM")) and count_numbers(content, MAX_TAG_NUMBERS) > MAX_TAG_NUMBERS:
        raise ImageError("the image has too many strips, tiles or tags; save it again", too_large=True)
    file = _File(content)
    image = Image.open(file, formats=FORMATS)
    width, height = image.size
    limit = min(max_megapixels, MAX_MEGAPIXELS)
    if width * height > limit * 1e6:
        raise ImageError(f"the image is {width}x{height}, more than {limit:g} megapixels", too_large=True)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"the image is {width}x{height}; crop it: one side is more than {MAX_ASPECT} times the other")
    file.allow(DECODE_CPU_S)
    return image


PNG_BITS = {"L;2": 2, "L;4": 4, "L": 8}
"""Bits per pixel of a grey PNG, by Pillow's name for how it is stored."""


def _mend_transparency(image: ImageFile.ImageFile) -> None:
    """Scale a PNG's transparent colour to 8 bits: Pillow scales the pixels but keeps the colour as stored."""
    declared = image.info.get("transparency")
    if isinstance(declared, str):  # a text comment of that name
        del image.info["transparency"]
    elif image.format == "PNG" and declared is not None and image.mode in ("L", "RGB"):
        if isinstance(declared, tuple):
            image.info["transparency"] = tuple(each & 255 for each in declared)
        else:
            white = 2 ** PNG_BITS[str(image.tile[0].args)] - 1
            image.info["transparency"] = (declared & white) * 255 // white


def _deep_rgb(image: ImageFile.ImageFile, again: ImageFile.ImageFile) -> Image.Image:
    """An RGB PNG of 16 bits. Its transparent colour is compared in full, as others may have the same upper bytes.

    `again` is the same file, whose pixels Pillow is made to read the lower bytes of.
    """
    declared = image.info.pop("transparency", None)
    image.load()
    if not isinstance(declared, tuple):
        return image
    again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
    again.load()
    transparent = np.ones((image.height, image.width), bool)
    for channel, value in enumerate(declared):
        transparent &= np.asarray(image.getchannel(channel)) == value >> 8
        transparent &= np.asarray(again.getchannel(channel)) == value & 255
    image.paste("white", mask=Image.fromarray(transparent))
    return image


def _rgb(image: ImageFile.ImageFile) -> Image.Image:
    """The decoded picture in 8-bit RGB."""
    if image.mode.startswith(("I", "F")):
        return _eight_bit(image).convert("RGB")
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: ImageFile.ImageFile) -> Image.Image:
    opaque = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)  # colours already multiplied by alpha
    rgba = (image.convert(opaque) if opaque else image).convert("RGBA")
    if image.format == "BMP" and rgba.getchannel("A").getextrema() == (0, 0):
        return rgba.convert("RGB")  # the writer left the fourth byte empty
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _eight_bit(image: ImageFile.ImageFile) -> Image.Image:
    """Scale a grey picture of more than 8 bits to 8. Pillow's own conversion would clip it at white."""
    values = np.asarray(image)
    if values.dtype.kind == "u":
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        white = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
        grey = (values // (white // 255)).astype(np.uint8)
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
            grey = 255 - grey
        if (transparent := image.info.get("transparency")) is not None:
            grey[values == transparent] = 255
        return Image.fromarray(grey)
    values = values.astype(np.float32)
    top = float(values.max(where=np.isfinite(values), initial=0))
    white = next((white for white in (1, 255, 65535) if top <= white), top)
    np.nan_to_num(values, copy=False, posinf=white, neginf=0)
    values *= 255 / white
    return Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation; 1 if it can't be read, as the picture can still be used."""
    if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged block may make Pillow fail in any way
        return 1


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)
