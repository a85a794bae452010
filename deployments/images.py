"""The one place where image files are opened, by whoever checks them and by the model that looks at them.

A file that two parsers take for two pictures could be checked as one and looked at as the other, so the formats, the
limits and the decoding are the same for all. What a file may cost is bounded: its pixels by the header, before one is
decoded, and the work on everything else that a file can hold by a clock.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, WebPImagePlugin  # noqa: F401  # or all formats are loaded

from deployments.messages import MAX_ASPECT
from deployments.spec import ItemError
from deployments.tiff_tags import count_numbers

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

MAX_MEGAPIXELS = 50.0
"""Pillow keeps 4 bytes for a pixel, and as many again while a picture is turned or laid on white; decoders need more
beside. Measured at this limit: 190 MB for a JPEG, 470 for a progressive one, 560 for a PNG or a TIFF with transparency,
940 for such a WebP. The 13,000 x 13,000 pixels that a file of a few kB can hold would take 3 GB."""

HEADER_CPU_S, DECODE_CPU_S = 1.0, 10.0
"""CPU time of this thread. At the limit of pixels a 12 MB JPEG took 0.9 s and no other format more; small files of
thousands of scans, segments or inflated profiles took minutes."""
BLOCK_BYTES = 1024
"""What a JPEG decoder is given at once: the clock is looked at in between, and a scan over all pixels can be ten bytes
long. Larger blocks were no faster."""
MAX_TAG_NUMBERS = 100_000
"""In all tags of a TIFF: Pillow makes Python objects of them, 60 to 200 bytes for each. A picture of 50 megapixels
has at most some ten thousand strips or tiles."""
MAX_EXIF_BYTES = 2**20
"""Of a block that is looked into for the orientation; cameras write at most 64 kB."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation."""


class ImageError(ItemError):
    """A file that is no image, or one that is not taken. The message says what to change."""

    def __init__(self, message: str, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


@dataclass(frozen=True)
class Header:
    """What a file says it is."""

    media_type: str
    extension: str
    width: int
    height: int
    """As stored, before the picture is turned upright."""


def read_header(content: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Header:
    """What the image is, without decoding a pixel. Raises ImageError also where it is too large to be decoded."""
    with _readable():
        image = _open(content, max_megapixels)
        kind = "JPEG" if image.format == "MPO" else image.format or ""  # a JPEG that other pictures follow
        return Header(Image.MIME[kind], kind.lower(), image.width, image.height)


def decode(content: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """The picture upright, in 8-bit RGB, on white where it is transparent; of an animation the first frame.

    Raises ImageError for what can't be decoded to its end, and for what is too large, whatever the caller's limit.
    """
    with _readable():
        image = _open(content, max_megapixels)
        _mend_transparency(image)
        if image.format in ("JPEG", "MPO"):
            image.decodermaxblock = BLOCK_BYTES
        image.load()
        return _upright(_rgb(image), _orientation(image))


class _File(io.BytesIO):
    """A file that is read only as long as its decoding does not take too much time."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.allow(HEADER_CPU_S)

    def allow(self, cpu_s: float) -> None:
        self._until = time.thread_time() + cpu_s

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._until:
            raise ImageError("the image takes too long to decode; save it anew", too_large=True)
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
    except Exception as error:  # a damaged file may trip Pillow up in any way
        raise ImageError(f"the image can't be read; send one of {', '.join(FORMATS)}") from error


def _open(content: bytes, max_megapixels: float) -> ImageFile.ImageFile:
    """The image as its header says, which may be decoded."""
    if content.startswith((b"II", b"MM")) and count_numbers(content, MAX_TAG_NUMBERS) > MAX_TAG_NUMBERS:
        raise ImageError("the image has too many strips, tiles or tags; save it anew", too_large=True)
    file = _File(content)
    image = Image.open(file, formats=FORMATS)
    width, height = image.size
    limit = min(max_megapixels, MAX_MEGAPIXELS)
    if width * height > limit * 1e6:
        raise ImageError(f"the image is {width}x{height}, more than {limit:g} megapixels", too_large=True)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"the image is {width}x{height}; crop it, one side is over {MAX_ASPECT} times the other")
    file.allow(DECODE_CPU_S)
    return image


PNG_BITS = {"L;2": 2, "L;4": 4, "L": 8}
"""Of a grey PNG, by Pillow's name for how it is stored."""


def _mend_transparency(image: ImageFile.ImageFile) -> None:
    """The colour that a PNG declares transparent, in 8 bits: Pillow has it as stored, though not the pixels."""
    declared = image.info.get("transparency")
    if isinstance(declared, str):  # a comment of that name
        del image.info["transparency"]
    elif image.format == "PNG" and declared is not None and image.mode in ("L", "RGB"):
        stored = image.tile[0].args
        if isinstance(declared, tuple):
            image.info["transparency"] = tuple(each >> 8 if stored == "RGB;16B" else each & 255 for each in declared)
        else:
            white = 2 ** PNG_BITS[str(stored)] - 1
            image.info["transparency"] = (declared & white) * 255 // white


def _rgb(image: ImageFile.ImageFile) -> Image.Image:
    """The decoded picture in 8-bit RGB."""
    if image.mode.startswith(("I", "F")):
        return _eight_bit(image).convert("RGB")
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: ImageFile.ImageFile) -> Image.Image:
    opaque = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)  # colours that are multiplied by alpha already
    rgba = (image.convert(opaque) if opaque else image).convert("RGBA")
    if image.format == "BMP" and rgba.getchannel("A").getextrema() == (0, 0):
        return rgba.convert("RGB")  # whoever wrote it left the fourth byte empty
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _eight_bit(image: ImageFile.ImageFile) -> Image.Image:
    """A grey picture of more than 8 bits scaled to 8, where Pillow's own conversion would cut it off at white."""
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
    values = np.nan_to_num(values.astype(np.float32), copy=False)
    top = float(values.max())
    values *= 255 / next((white for white in (1, 255, 65535) if top <= white), top)
    return Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF's, 1 where there is none that can be read: the picture is no worse for it."""
    if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged block may trip Pillow up in any way
        return 1


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)
