"""Opening image files: what is seen of them, what is refused, and what that costs."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from deployments.images import ImageError, decode, read_header
from tests.pictures import (
    ALPHA,
    RGB,
    bmp_with_alpha,
    chunk,
    encoded,
    phone_picture,
    png,
    polyglot,
    raw_tiff,
)

PICTURE = Image.fromarray(RGB)
GREY = PICTURE.convert("L")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def jpeg(image: Image.Image = PICTURE, **options: object) -> bytes:
    return encoded(image, "JPEG", quality=90, **options)


def opaque() -> dict[str, bytes]:
    """Of 8 bits, without transparency."""
    return {
        "png": encoded(PICTURE),
        "png grey": encoded(GREY),
        "png black and white": encoded(PICTURE.convert("1")),
        "png palette": encoded(PICTURE.quantize(40)),
        "png interlaced sizes": encoded(PICTURE.resize((1, 1))),
        "apng": encoded(PICTURE, save_all=True, append_images=[PICTURE.rotate(180)]),
        "png turned": encoded(PICTURE, exif=turned(8)),
        "png opaque alpha": encoded(PICTURE.convert("RGBA")),
        "jpeg": jpeg(),
        "jpeg grey": jpeg(GREY),
        "jpeg progressive": jpeg(progressive=True),
        "jpeg cmyk": jpeg(PICTURE.convert("CMYK")),
        "mpo": phone_picture(),
        **{f"jpeg turned {number}": jpeg(exif=turned(number)) for number in range(1, 9)},
        "webp": encoded(PICTURE, "WEBP"),
        "webp lossless": encoded(PICTURE, "WEBP", lossless=True),
        "webp turned": encoded(PICTURE, "WEBP", exif=turned(6)),
        "gif": encoded(PICTURE.quantize(60), "GIF"),
        "gif grey": encoded(GREY, "GIF"),
        "gif animated": encoded(PICTURE.quantize(9), "GIF", save_all=True, append_images=[PICTURE.rotate(180)]),
        "bmp": encoded(PICTURE, "BMP"),
        "bmp palette": encoded(PICTURE.quantize(20), "BMP"),
        "bmp grey": encoded(GREY, "BMP"),
        "tiff": encoded(PICTURE, "TIFF"),
        "tiff lzw": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": encoded(PICTURE, "TIFF", compression="jpeg"),
        "tiff black and white": encoded(PICTURE.convert("1"), "TIFF", compression="group4"),
        "tiff palette": encoded(PICTURE.quantize(30), "TIFF"),
        "tiff cmyk": encoded(PICTURE.convert("CMYK"), "TIFF", compression="tiff_adobe_deflate"),
        "tiff ycbcr": encoded(PICTURE.convert("YCbCr"), "TIFF"),
        "tiff lab": encoded(PICTURE.convert("LAB"), "TIFF"),
        "tiff turned": encoded(PICTURE, "TIFF", exif=turned(5)),
        "tiff pages": encoded(PICTURE, "TIFF", save_all=True, append_images=[PICTURE.rotate(180)]),
    }


@pytest.mark.parametrize("name", opaque())
def test_what_is_opaque_and_of_8_bits_is_what_pillow_makes_of_it(name: str) -> None:
    content = opaque()[name]
    plain = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    seen = decode(content)
    assert (seen.mode, seen.size) == ("RGB", plain.size)
    assert seen.tobytes() == plain.tobytes()


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def keyed(rgb: np.ndarray, *at: tuple[int, int]) -> np.ndarray:
    """The picture with the pixels at these places white."""
    expected = rgb.copy()
    for row, column in at:
        expected[row, column] = 255
    return expected


def grey_rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Several pixels to a byte."""
    shifts = np.arange(8 - bits, -1, -bits)
    return (values.reshape(len(values), -1, 8 // bits) << shifts).sum(axis=2).astype(np.uint8)


def transparent() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files, and what is to be seen of them."""
    rgba = Image.fromarray(np.dstack([RGB, ALPHA]))
    grey = np.asarray(GREY)
    la = Image.merge("LA", (GREY, Image.fromarray(ALPHA)))
    blend, grey_blend = on_white(RGB, ALPHA), on_white(grey_rgb(grey), ALPHA)
    few = PICTURE.quantize(16)
    shown = np.asarray(few.convert("RGB"))
    indices = np.asarray(few)
    levels = {bits: (np.asarray(GREY).astype(np.int64) >> (8 - bits)) for bits in (1, 2, 4)}
    wide = (RGB.astype(np.uint16) * 256 + 9).astype(">u2")
    premultiplied = (RGB.astype(np.int64) * ALPHA[..., None] // 255).astype(np.uint8)
    palette_alphas = bytes(range(0, 256, 17))
    return {
        "png rgba": (encoded(rgba), blend),
        "png la": (encoded(la), grey_blend),
        "png all transparent": (encoded(Image.new("RGBA", (40, 24))), np.full((24, 40, 3), 255)),
        "png palette, one colour": (
            encoded(few, transparency=3),
            np.where((indices == 3)[..., None], 255, shown),
        ),
        "png palette, alphas": (
            encoded(few, transparency=palette_alphas),
            on_white(shown, np.frombuffer(palette_alphas, np.uint8)[indices]),
        ),
        "png rgb, a colour": (
            png(RGB, 8, 2, chunk(b"tRNS", struct.pack(">HHH", *RGB[3, 4]))),
            keyed(RGB, (3, 4)),
        ),
        "png rgb 16, a colour": (
            png(wide, 16, 2, chunk(b"tRNS", struct.pack(">HHH", *wide[3, 4]))),
            keyed(RGB, (3, 4)),
        ),
        "png grey 8, a colour": (
            png(grey, 8, 0, chunk(b"tRNS", struct.pack(">H", grey[0, 0]))),
            grey_rgb(np.where(grey == grey[0, 0], 255, grey)),
        ),
        "png grey 16, a colour": (
            png(grey.astype(">u2") * 257, 16, 0, chunk(b"tRNS", struct.pack(">H", int(grey[0, 0]) * 257))),
            grey_rgb(np.where(grey == grey[0, 0], 255, grey)),
        ),
        **{
            f"png grey {bits}, a colour": (
                png(packed(level, bits), bits, 0, chunk(b"tRNS", struct.pack(">H", level[0, 0])), width=40),
                grey_rgb(np.where(level == level[0, 0], 255, level * 255 // (2**bits - 1))),
            )
            for bits, level in levels.items()
            if (level != level[0, 0]).any()
        },
        "png rgba 16": (
            png(np.dstack([RGB, ALPHA]).astype(">u2") * 257, 16, 6),
            blend,
        ),
        "png la 16": (png(np.dstack([grey, ALPHA]).astype(">u2") * 257, 16, 4), grey_blend),
        "png turned": (encoded(rgba, exif=turned(6)), np.rot90(blend, -1)),
        "apng": (encoded(rgba, save_all=True, append_images=[rgba.rotate(180)]), blend),
        "gif": (encoded(few, "GIF", transparency=3), np.where((indices == 3)[..., None], 255, shown)),
        "gif animated": (
            encoded(few, "GIF", transparency=3, save_all=True, append_images=[few.rotate(180)], disposal=2),
            np.where((indices == 3)[..., None], 255, shown),
        ),
        "gif grey": (encoded(GREY, "GIF", transparency=77), grey_rgb(np.where(grey == 77, 255, grey))),
        "webp": (encoded(rgba, "WEBP", lossless=True, exact=True), blend),
        "webp animated": (
            encoded(rgba, "WEBP", lossless=True, exact=True, save_all=True, append_images=[rgba.rotate(180)]),
            blend,
        ),
        "tiff rgba": (encoded(rgba, "TIFF"), blend),
        "tiff rgba lzw": (encoded(rgba, "TIFF", compression="tiff_lzw"), blend),
        "tiff la": (encoded(la, "TIFF"), grey_blend),
        "tiff pa": (encoded(few.convert("PA"), "TIFF"), shown),
        "tiff premultiplied": (raw_tiff(np.dstack([premultiplied, ALPHA]), (8, 8, 8, 8), 2, 1), blend),
        "tiff grey premultiplied": (
            raw_tiff(np.dstack([(grey.astype(np.int64) * ALPHA // 255).astype(np.uint8), ALPHA]), (8, 8), 1, 1),
            grey_blend,
        ),
        "tiff rgba 16": (raw_tiff(np.dstack([RGB, ALPHA]).astype("<u2") * 257, (16,) * 4, 2, 2), blend),
        "bmp whose alpha is not declared": (encoded(rgba, "BMP"), RGB),
        "bmp with alpha": (bmp_with_alpha(np.dstack([RGB, ALPHA])), blend),
        "bmp with an empty alpha": (bmp_with_alpha(np.dstack([RGB, np.zeros_like(ALPHA)])), RGB),
    }


@pytest.mark.parametrize("name", transparent())
def test_what_is_transparent_is_laid_on_white(name: str) -> None:
    content, expected = transparent()[name]
    seen = np.asarray(decode(content)).astype(float)
    tolerance = 2 + 255 / np.maximum(ALPHA, 16)[..., None] if "premultiplied" in name else 1.01  # it was rounded twice
    if seen.shape == expected.shape == RGB.shape:
        assert (np.abs(seen - expected) <= tolerance).all()
    else:
        assert np.abs(seen - expected).max() <= 1.01


@pytest.mark.parametrize("colour", [(0x1234, 0x5678, 0x9ABC), (0, 0, 0), (0xFF00, 0x00FF, 0x8080)])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_colours_with_the_upper_bytes_of_the_transparent_one_are_seen(
    colour: tuple[int, int, int], channel: int
) -> None:
    pixels = np.empty((6, 5, 3), ">u2")
    pixels[:] = colour
    pixels[2:, :, channel] ^= 1
    seen = np.asarray(decode(png(pixels, 16, 2, chunk(b"tRNS", struct.pack(">HHH", *colour)), width=5)))
    assert (seen[:2] == 255).all()
    assert (seen[2:] == np.array(colour) >> 8).all()


def test_a_shape_that_is_only_in_the_alpha_channel_is_seen() -> None:
    black = np.zeros_like(RGB)
    shape = np.zeros_like(ALPHA)
    shape[5:9, 7:30] = 255
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        seen = np.asarray(decode(encoded(Image.fromarray(np.dstack([black, shape])), kind, **options)))
        assert (seen == 255 - shape[..., None]).all()


def deep() -> dict[str, tuple[bytes, np.ndarray]]:
    """Grey pictures of more than 8 bits, and what is to be seen of them."""
    grey = np.asarray(GREY)
    sixteen = (grey.astype("<u2") * 257 + 3 * (grey < 255)).astype("<u2")
    twelve = (grey.astype(np.uint16) << 4) | (grey >> 4)
    even, odd = twelve[:, ::2].astype(np.uint32), twelve[:, 1::2].astype(np.uint32)
    triples = np.stack([even >> 4, ((even & 15) << 4) | (odd >> 8), odd & 255], axis=2).astype(np.uint8)
    dark = (grey // 4).astype("<u2") * 257
    return {
        "png": (encoded(Image.fromarray(sixteen)), grey),
        "png dark": (encoded(Image.fromarray(dark)), grey // 4),
        "tiff": (encoded(Image.fromarray(sixteen), "TIFF"), grey),
        "tiff big-endian": (encoded(Image.fromarray(sixteen.astype(">u2")), "TIFF"), grey),
        "tiff dark big-endian": (encoded(Image.fromarray((grey // 4).astype(">u2")), "TIFF"), np.zeros_like(grey)),
        "tiff white is zero": (raw_tiff(65535 - sixteen, (16,), 0), grey),
        "tiff lzw": (encoded(Image.fromarray(sixteen), "TIFF", compression="tiff_lzw"), grey),
        "tiff 12 bits": (raw_tiff(triples.reshape(24, 60), (12,), 1, width=40), grey),
        "tiff int32": (encoded(Image.fromarray(sixteen.astype(np.int32)), "TIFF"), grey),
        "tiff int32 of 8": (encoded(Image.fromarray(grey.astype(np.int32)), "TIFF"), grey),
        "tiff float": (
            encoded(Image.fromarray(grey.astype(np.float32) / grey.max()), "TIFF"),
            grey * (255 / grey.max()),
        ),
        "tiff float of 8": (encoded(Image.fromarray(grey.astype(np.float32)), "TIFF"), grey),
        "tiff float with gaps": (encoded(Image.fromarray(gaps(grey)), "TIFF"), np.nan_to_num(gaps(grey))),
    }


def gaps(grey: np.ndarray) -> np.ndarray:
    values = grey.astype(np.float32)
    values[0, :5] = np.nan
    return values


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_colours_of_16_bits_are_scaled(kind: str) -> None:
    wide = RGB.astype(np.uint16) * 257
    for lower in (0, 0x00FF):
        pixels = (wide & 0xFF00) | lower
        content = png(pixels.astype(">u2"), 16, 2) if kind == "png" else raw_tiff(pixels.astype("<u2"), (16, 16, 16), 2)
        assert (np.asarray(decode(content)) == RGB).all()


@pytest.mark.parametrize(("bad", "shown"), [(np.inf, 255), (-np.inf, 0), (np.nan, 0)], ids=["inf", "-inf", "nan"])
@pytest.mark.parametrize("white", [1, 255, 65535, 1e6])
@pytest.mark.filterwarnings("error")
def test_pixels_without_a_finite_value_hide_no_others(bad: float, shown: int, white: float) -> None:
    values = np.asarray(GREY).astype(np.float32) * (white / 255)
    values[0, 0] = white
    values[3:5, 4] = bad
    seen = np.asarray(decode(encoded(Image.fromarray(values), "TIFF")))[..., 0].astype(int)
    expected = np.asarray(GREY).astype(int)
    expected[0, 0], expected[3:5, 4] = 255, shown
    assert np.abs(seen - expected).max() <= 1


@pytest.mark.parametrize(("bad", "shown"), [(np.inf, 255), (-np.inf, 0), (np.nan, 0)])
@pytest.mark.filterwarnings("error")
def test_a_picture_without_a_finite_value_is_one_colour(bad: float, shown: int) -> None:
    seen = np.asarray(decode(encoded(Image.fromarray(np.full((8, 8), bad, np.float32)), "TIFF")))
    assert (seen == shown).all()


@pytest.mark.parametrize("name", deep())
def test_what_has_more_than_8_bits_is_scaled(name: str) -> None:
    content, expected = deep()[name]
    seen = np.asarray(decode(content)).astype(float)
    assert (seen[..., 0] == seen[..., 2]).all()
    assert np.abs(seen[..., 1] - expected).max() <= 1


def test_what_is_checked_is_what_is_seen() -> None:
    content = polyglot()
    with Image.open(io.BytesIO(content), formats=["FLI"]) as other:
        assert other.size == (13_000, 13_000)
    header = read_header(content)
    assert (header.media_type, header.width, header.height) == ("image/tiff", 16, 16)
    assert (np.asarray(decode(content))[..., 0] == RGB[:16, :16, 0]).all()


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "PCX", "SGI", "JPEG2000", "AVIF", "DDS", "IM", "QOI"])
def test_other_formats_are_refused_by_name(kind: str) -> None:
    content = encoded(PICTURE.resize((32, 32)), kind)
    for refuse in (read_header, decode):
        with pytest.raises(ImageError, match="send one of PNG, JPEG"):
            refuse(content)


@pytest.mark.parametrize(
    ("content", "media_type", "extension"),
    [
        (encoded(PICTURE), "image/png", "png"),
        (jpeg(), "image/jpeg", "jpeg"),
        (phone_picture(), "image/jpeg", "jpeg"),
        (phone_picture(exif=turned(6)), "image/jpeg", "jpeg"),
        (encoded(PICTURE, "WEBP"), "image/webp", "webp"),
        (encoded(GREY, "GIF"), "image/gif", "gif"),
        (encoded(PICTURE, "BMP"), "image/bmp", "bmp"),
        (encoded(PICTURE, "TIFF"), "image/tiff", "tiff"),
    ],
)
def test_a_header_says_what_a_file_is(content: bytes, media_type: str, extension: str) -> None:
    header = read_header(content)
    assert (header.media_type, header.extension) == (media_type, extension)
    assert (header.width, header.height) == (40, 24)
