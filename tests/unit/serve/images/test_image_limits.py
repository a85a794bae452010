"""What is refused of image files, and what opening one may cost."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from deployments import images
from deployments.images import ImageError, decode, read_header
from serve.config.settings import Limits
from serve.errors import DureError
from serve.images.uploaded import look_at
from tests.pictures import ALPHA, RGB, chunk, encoded, phone_picture, png, polyglot, shorts, tiff

PICTURE = Image.fromarray(RGB)
GREY = PICTURE.convert("L")


def flat(width: int, height: int, kind: str, **options: object) -> bytes:
    return encoded(Image.new("L", (width, height)), kind, **options)


@pytest.mark.parametrize(
    "content",
    [
        flat(7200, 7200, "PNG"),
        flat(7200, 7200, "JPEG"),
        flat(7200, 7200, "GIF"),
        flat(7200, 7200, "TIFF", compression="tiff_adobe_deflate"),
        encoded(Image.new("RGB", (7200, 7200)), "WEBP", lossless=True, method=0),
        png(np.zeros((1, 1), np.uint8), 8, 0, width=2**31 - 1),
    ],
    ids=["png", "jpeg", "gif", "tiff", "webp", "png of 2 billion"],
)
def test_too_many_pixels_are_refused_before_one_is_decoded(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    for refuse in (read_header, decode):
        with pytest.raises(ImageError) as caught:
            refuse(content, 200)  # a caller's own limit may only be lower
        assert caught.value.too_large


def test_a_callers_limit_may_be_lower() -> None:
    assert decode(encoded(PICTURE), 0.001).size == (40, 24)
    with pytest.raises(ImageError, match=r"40x24, more than 0\.0005 megapixels"):
        decode(encoded(PICTURE), 0.0005)


def test_a_picture_too_thin_to_be_scaled_is_refused() -> None:
    for size in ((40, 2000), (2001, 40)):
        content = encoded(Image.new("RGB", size))
        if max(size) == 2000:
            assert decode(content).size == size
        else:
            with pytest.raises(ImageError, match="crop it"):
                read_header(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        encoded(PICTURE)[:-400],
        encoded(PICTURE, "JPEG")[:300],
        b"II*\0",
        b"MM\0*\0\0\0\x08\xff\xff",
        b"II+\0\x08\0\0\0",
        b"II+\0\x08\0\0\0" + b"\xff" * 64,
        b"GIF89a",
        b"BM" + bytes(60),
        b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(30),
    ],
)
def test_damaged_files_are_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match="can't be read"):
        decode(content)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_damaged_is_decoded_or_refused(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    modes = (PICTURE, GREY, PICTURE.quantize(30), Image.fromarray(np.dstack([RGB, ALPHA])))
    files = [encoded(mode if kind != "JPEG" else GREY, kind) for kind in kinds for mode in modes]
    for content in [*files, phone_picture(), encoded(GREY, "TIFF", compression="tiff_lzw")]:
        damaged = np.frombuffer(content, np.uint8).copy()
        at = rng.integers(0, min(len(damaged), 200 if seed % 2 else len(damaged)), 4)
        damaged[at] = rng.integers(0, 256, 4)
        with contextlib.suppress(ImageError):
            assert decode(damaged.tobytes()).mode == "RGB"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_block_leaves_the_picture_as_it_is(kind: str) -> None:
    for block in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01"):
        assert decode(encoded(PICTURE, kind, exif=block)).size == (40, 24)


@pytest.mark.parametrize("name", [b"transparency", b"exif", b"xmp", b"Raw profile type exif"])
def test_a_comment_is_not_taken_for_what_its_name_says(name: bytes) -> None:
    for text in (chunk(b"tEXt", name + b"\0" + b"8"), chunk(b"zTXt", name + b"\0\0" + zlib.compress(b"8"))):
        assert decode(png(RGB, 8, 2, text)).tobytes() == PICTURE.tobytes()


def exif_with(numbers: int) -> bytes:
    """Turned, and with a long list of numbers in a tag of its own."""
    entries = struct.pack("<HHLL", 0x0112, 3, 1, 6) + struct.pack("<HHLL", 0x0111, 3, numbers, 38)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + bytes(4) + b"\1\3" * numbers


def test_of_a_huge_exif_block_nothing_is_unpacked() -> None:
    assert decode(encoded(PICTURE, exif=exif_with(1000))).size == (24, 40)
    started = time.thread_time()
    assert decode(encoded(PICTURE, exif=exif_with(6_000_000))).size == (40, 24)
    assert time.thread_time() - started < 0.5


def scans(count: int) -> bytes:
    """A progressive JPEG with so many more scans over all its pixels."""
    start = encoded(Image.new("RGB", (2400, 2400), "red"), "JPEG", progressive=True)
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([1, 0, 1, 63, 0])
    return start[:-2] + scan * count + start[-2:]


def gif_with(blocks: bytes) -> bytes:
    content = encoded(GREY, "GIF")
    start = 13 + (3 << ((content[10] & 7) + 1))
    return content[:start] + blocks + content[start:]


def jpeg_with(segment: bytes, count: int) -> bytes:
    content = encoded(PICTURE, "JPEG")
    return content[:2] + segment * count + content[2:]


def bombs() -> Iterator[tuple[str, bytes]]:
    yield "png of tiny chunks", png(RGB, 8, 2, chunk(b"abCd", b"") * 400_000)
    inflated = zlib.compress(bytes(2**20 - 1))
    yield "png of profiles", png(RGB, 8, 2, chunk(b"iCCP", b"a\0\0" + inflated) * 3000)
    yield "png of texts", png(RGB, 8, 2, chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"\xff" * 2**19)) * 5000)
    yield "png of empty pixels", png(RGB, 8, 2, chunk(b"IDAT", b"") * 400_000)
    yield "gif of tiny comments", gif_with(b"!\xfe" + b"\x01a" * 4_000_000 + b"\0")
    yield "gif of extensions", gif_with(b"!\x01\x01a\0" * 1_000_000)
    yield "jpeg of tiny segments", jpeg_with(b"\xff\xe5\0\x02", 2_000_000)
    yield "jpeg of comments", jpeg_with(b"\xff\xfe\0\x02", 2_000_000)
    tables = (b"\0" + bytes(range(1, 65))) * 1000
    yield "jpeg of tables", jpeg_with(b"\xff\xdb" + struct.pack(">H", 2 + len(tables)) + tables, 200)
    yield "jpeg of scans", scans(20_000)
    line = struct.pack("<IiiHHIIiiII", 40, 3000, 3000, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024)
    yield "bmp of empty lines", b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 1064) + line + b"\1\5\0\0" * 3000


@pytest.mark.parametrize(("name", "content"), bombs(), ids=lambda value: value if isinstance(value, str) else "")
def test_work_on_one_file_is_bounded(name: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "HEADER_CPU_S", 0.1)
    monkeypatch.setattr(images, "DECODE_CPU_S", 0.3)
    started = time.thread_time()
    with pytest.raises(ImageError, match="takes too long"):
        decode(content)
    assert time.thread_time() - started < 1.5


@pytest.mark.parametrize(
    "tags",
    [
        {273: (4, 4_000_000, struct.pack("<L", 0) * 4_000_000)},
        {320: (3, 3_000_000, bytes(6_000_000)), 262: shorts(3)},
        {258: (3, 3_000_000, b"\x08\0" * 3_000_000)},
        {33432: (5, 500_000, bytes(4_000_000))},
    ],
    ids=["strips", "palette", "bits", "fractions"],
)
def test_a_tiff_of_millions_of_numbers_is_refused(tags: dict[int, tuple[int, int, bytes]]) -> None:
    plain = {256: shorts(8), 257: shorts(8), 258: shorts(8), 262: shorts(1), 273: (4, 1, b""), 278: (4, 1, b"\x01")}
    assert decode(tiff(plain | {279: (4, 1, b"\x40")}, bytes(64))).size == (8, 8)
    started = time.thread_time()
    with pytest.raises(ImageError, match="too many strips"):
        decode(tiff(plain | tags, bytes(64)))
    assert time.thread_time() - started < 0.5


@pytest.mark.parametrize("tag", [0x8769, 0x8825])
def test_numbers_behind_a_tag_count_too(tag: int) -> None:
    plain = {256: shorts(8), 257: shorts(8), 258: shorts(8), 262: shorts(1), 273: (4, 1, b""), 278: (4, 1, b"\x08")}
    whole = tiff(plain | {279: (4, 1, b"\x40"), tag: (4, 1, bytes(4))}, bytes(64))
    directory = struct.pack("<HHHLL", 1, 0x829A, 5, 500_000, len(whole) + 18) + bytes(4 + 4_000_000)
    led_to = whole.replace(struct.pack("<HHLL", tag, 4, 1, 0), struct.pack("<HHLL", tag, 4, 1, len(whole)))
    with pytest.raises(ImageError, match="too many"):
        decode(led_to + directory)


@pytest.mark.parametrize("kind", [1, 3])
def test_a_tiff_of_millions_of_tags_is_refused(kind: int) -> None:
    tags = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 500_000) + struct.pack("<HHQQ", 700, kind, 0, 0) * 500_000
    started = time.thread_time()
    with pytest.raises(ImageError, match="too many"):
        decode(tags)
    assert time.thread_time() - started < 0.5


def test_a_tiff_of_ordinary_tags_in_every_layout_is_decoded() -> None:
    large = Image.fromarray(np.tile(RGB, (20, 20, 1)))
    for options in ({}, {"big_tiff": True}, {"tiffinfo": {278: 1}}, {"compression": "tiff_lzw", "tiffinfo": {278: 1}}):
        assert decode(encoded(large, "TIFF", **options)).tobytes() == large.tobytes()


def test_of_thousands_of_frames_the_first_is_decoded() -> None:
    first = Image.new("RGB", (16, 16), (200, 10, 10))
    frames = [Image.new("RGB", (16, 16), (0, shade, 0)) for shade in range(200)]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        content = encoded(first, kind, save_all=True, append_images=frames, **options)
        started = time.thread_time()
        seen = decode(content)
        assert time.thread_time() - started < 0.3
        assert np.abs(np.asarray(seen).astype(int) - (200, 10, 10)).max() < 4


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"", 400, "empty"),
        (b"no image", 400, "send one of PNG"),
        (encoded(PICTURE)[:-400], 400, "can't be read"),
        (encoded(PICTURE, "ICO"), 400, "send one of PNG"),
        (flat(1100, 1000, "PNG"), 413, "1100x1000, more than 1 megapixels"),
        (flat(900, 3, "PNG"), 400, "crop it"),
        (bytes(2**20), 413, "more than 0.5 MB"),
        (png(RGB, 8, 2, chunk(b"tRNS", b"")), 400, "can't be read"),
    ],
)
def test_clients_are_told_what_is_wrong_with_an_image(content: bytes, status: int, said: str) -> None:
    with pytest.raises(DureError, match=said) as caught:
        asyncio.run(look_at(content, Limits(max_image_mb=0.5, max_image_megapixels=1)))
    assert (caught.value.status, caught.value.param) == (status, "image")


def test_clients_may_send_what_models_can_see() -> None:
    for content, media_type in ((phone_picture(), "image/jpeg"), (polyglot(), "image/tiff")):
        assert asyncio.run(look_at(content, Limits())).media_type == media_type
