"""Images that clients send: refused by their header before a pixel is decoded."""

from __future__ import annotations

import asyncio
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import UploadFile
from PIL import Image, ImageOps

from deployments.items import MAX_ASPECT
from serve import errors
from serve.errors import DureError
from serve.settings import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


DECODED_AT_ONCE = 2
"""Per process: an image at the limit of pixels takes 200 MB while it is decoded, and as much again if it is turned."""
_decoding = asyncio.Semaphore(DECODED_AT_ONCE)


@dataclass(frozen=True)
class Look:
    """What an image is."""

    media_type: str
    extension: str
    width: int
    height: int


async def read_image(upload: UploadFile, limits: Limits, param: str = "image") -> bytes:
    """The upload's bytes. Raises a DureError for what is no image, or over a limit in bytes or pixels."""
    content = await upload.read()
    await _check(content, limits, param)
    return content


async def look_at(content: bytes, limits: Limits, param: str = "image") -> Look:
    """What the image is. Raises a DureError also where it can't be decoded to its end, or not be scaled."""
    await _check(content, limits, param)
    async with _decoding:
        return await asyncio.to_thread(_decode, content, param)


async def _check(content: bytes, limits: Limits, param: str) -> None:
    if not content:
        raise errors.invalid("the image is empty", param)
    if len(content) > limits.max_image_mb * 2**20:
        raise errors.too_large(f"the image has {len(content)} bytes, more than {limits.max_image_mb:g} MB", param)
    width, height = await asyncio.to_thread(_size, content, param)
    if width * height > limits.max_image_megapixels * 1e6:
        raise errors.too_large(
            f"the image is {width}x{height}, more than {limits.max_image_megapixels:g} megapixels", param
        )


def _size(content: bytes, param: str) -> tuple[int, int]:
    """Width and height from the header alone."""
    with _readable(param):
        return Image.open(io.BytesIO(content), formats=FORMATS).size


def _decode(content: bytes, param: str) -> Look:
    with _readable(param):
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise errors.invalid(
                f"the image is {width}x{height}; crop it, one side is over {MAX_ASPECT} times the other", param
            )
        kind = image.format or ""
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        return Look(Image.MIME.get(kind, "application/octet-stream"), kind.lower(), width, height)


@contextmanager
def _readable(param: str) -> Iterator[None]:
    """Raises a DureError for whatever Pillow may trip over."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except Image.DecompressionBombError as error:
        raise errors.too_large(f"the image is too large: {error}", param) from error
    except DureError:
        raise
    except Exception as error:  # a damaged file may trip Pillow up in any way
        raise errors.invalid(f"the image can't be read; send one of {', '.join(FORMATS)}", param) from error
