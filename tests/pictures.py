"""Image files for tests, written by Pillow, or by hand if Pillow can't write the format."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

RGB = np.random.default_rng(7).integers(0, 256, (24, 40, 3), dtype=np.uint8)
"""A picture of random pixels, all different, wider than high."""
ALPHA = np.random.default_rng(8).integers(0, 256, (24, 40), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(rows: np.ndarray, bits: int, colour: int, *before: bytes, width: int | None = None) -> bytes:
    """A PNG of packed bytes by row. `colour`: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGB with alpha."""
    height = len(rows)
    header = struct.pack(">IIBBBBB", width or rows.shape[1], height, bits, colour, 0, 0, 0)
    filtered = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(filtered)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(tags: dict[int, tuple[int, int, bytes]], pixels: bytes = b"", at: int = 8) -> bytes:
    """A little-endian TIFF. A tag is its type, length and bytes. An empty tag 273 becomes the offset of the pixels."""
    body = at + 2 + 12 * len(tags) + 4
    extra = b""
    entries = b""
    for tag, (kind, length, value) in sorted(tags.items()):
        if tag == 273 and not value:
            outside = sum(len(data) for _, _, data in tags.values() if len(data) > 4)
            value = struct.pack("<L", body + outside)
        if len(value) > 4:
            extra, value = extra + value, struct.pack("<L", body + len(extra))
        entries += struct.pack("<HHL", tag, kind, length) + value.ljust(4, b"\0")
    head = (b"II*\0" + struct.pack("<L", at)).ljust(at, b"\0")
    return head + struct.pack("<H", len(tags)) + entries + bytes(4) + extra + pixels


def shorts(*values: int) -> tuple[int, int, bytes]:
    return 3, len(values), struct.pack(f"<{len(values)}H", *values)


def raw_tiff(
    pixels: np.ndarray, bits: tuple[int, ...], photometric: int, *extra: int, width: int | None = None, at: int = 8
) -> bytes:
    """An uncompressed TIFF with one strip.

    `extra` gives the kind of each sample after the colours: 1 is premultiplied alpha, 2 is plain alpha. `width` is in
    pixels, for images with several pixels per byte.
    """
    height = len(pixels)
    tags = {
        256: shorts(width or pixels.shape[1]),
        257: shorts(height),
        258: shorts(*bits),
        259: shorts(1),
        262: shorts(photometric),
        273: (4, 1, b""),
        277: shorts(len(bits)),
        278: shorts(height),
        279: (4, 1, struct.pack("<L", pixels.nbytes)),
    } | ({338: shorts(*extra)} if extra else {})
    return tiff(tags, pixels.tobytes(), at)


def polyglot(width: int = 13_000, height: int = 13_000) -> bytes:
    """A TIFF of a few pixels that a reader looking for FLI first takes for an FLI of many pixels."""
    grey = RGB[:16, :16, 0]
    content = bytearray(raw_tiff(grey, (8,), 1, at=0x1AF12))
    content[8:128] = bytes(120)
    content[6:16] = struct.pack("<HHHHH", 1, width, height, 8, 0)
    return bytes(content)


def phone_picture(**options: Any) -> bytes:
    """A JPEG followed by further pictures (MPO)."""
    first = Image.fromarray(RGB)
    return encoded(first, "MPO", save_all=True, append_images=[first.rotate(180), first.resize((9, 9))], **options)


def bmp_with_alpha(rgba: np.ndarray) -> bytes:
    height, width = rgba.shape[:2]
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, 0, 0, 0, 0, 0) + masks
    pixels = rgba[::-1, :, [2, 1, 0, 3]].tobytes()
    start = 14 + 108
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header.ljust(108, b"\0") + pixels
