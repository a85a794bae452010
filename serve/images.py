"""Images that clients send: refused by their header before a pixel is decoded."""

from __future__ import annotations

import asyncio
import io
import warnings

from fastapi import UploadFile
from PIL import Image, UnidentifiedImageError

from serve import errors
from serve.settings import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


async def read_image(upload: UploadFile, limits: Limits, param: str = "image") -> bytes:
    """The upload's bytes. Raises a DureError for what is no image, or over a limit in bytes or pixels."""
    content = await upload.read()
    if not content:
        raise errors.invalid("the image is empty", param)
    if len(content) > limits.max_image_mb * 2**20:
        raise errors.too_large(f"the image has {len(content)} bytes, more than {limits.max_image_mb:g} MB", param)
    width, height = await asyncio.to_thread(_size, content, param)
    if width * height > limits.max_image_megapixels * 1e6:
        raise errors.too_large(
            f"the image is {width}x{height}, more than {limits.max_image_megapixels:g} megapixels", param
        )
    return content


def _size(content: bytes, param: str) -> tuple[int, int]:
    """Width and height from the header alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(content), formats=FORMATS).size
    except Image.DecompressionBombError as error:
        raise errors.too_large(f"the image is too large: {error}", param) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise errors.invalid(f"the image can't be read; send one of {', '.join(FORMATS)}", param) from error
