"""Images that clients send, checked with the decoder that the models use."""

from __future__ import annotations

import asyncio

from fastapi import UploadFile

from deployments import images
from deployments.images import Header, ImageError
from serve import errors
from serve.config.settings import Limits
from serve.errors import DureError

DECODED_AT_ONCE = 2
"""Images decoded at once per process; one at the pixel limit may take 1 GB while it is decoded."""
_decoding = asyncio.Semaphore(DECODED_AT_ONCE)


async def read_image(upload: UploadFile, limits: Limits, param: str = "image") -> bytes:
    """The upload's bytes. Raises a DureError if it is not an image, or exceeds a limit in bytes or pixels."""
    content = await upload.read()
    await _header(content, limits, param)
    return content


async def look_at(content: bytes, limits: Limits, param: str = "image") -> Header:
    """The image's header. Also raises a DureError if the image can't be decoded completely or scaled."""
    header = await _header(content, limits, param)
    async with _decoding:
        try:
            await asyncio.to_thread(images.decode, content, limits.max_image_megapixels)
        except ImageError as error:
            raise _refused(error, param) from error
    return header


async def _header(content: bytes, limits: Limits, param: str) -> Header:
    if not content:
        raise errors.invalid("the image is empty", param)
    if len(content) > limits.max_image_mb * 2**20:
        raise errors.too_large(f"the image has {len(content)} bytes, more than {limits.max_image_mb:g} MB", param)
    try:
        return await asyncio.to_thread(images.read_header, content, limits.max_image_megapixels)
    except ImageError as error:
        raise _refused(error, param) from error


def _refused(error: ImageError, param: str) -> DureError:
    return (errors.too_large if error.too_large else errors.invalid)(str(error), param)
