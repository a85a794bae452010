"""Counts the numbers in a TIFF's tags before Pillow makes Python objects of them."""

from __future__ import annotations

import struct

CLASSIC, BIG = ("L", "H", "HHLL"), ("Q", "Q", "HHQQ")
"""Struct formats of an offset, a count of entries, and an entry: tag, type, length, and the value or its offset.

In both, the first directory's offset follows a header of the same size:
https://www.awaresystems.be/imaging/tiff/bigtiff.html.
"""
SHORT = 3
BYTES = (1, 2, 6, 7)
"""Types that Pillow leaves as bytes: BYTE, ASCII, SBYTE, UNDEFINED."""
DIRECTORIES = (0x8769, 0x8825, 0xA005)
"""Tags that point to directories of further tags: Exif, GPS, interoperability."""
MAX_DIRECTORIES = 1 + 3 + 9
"""The first directory, those it points to, and those that these point to. Pillow follows no more."""


def count_numbers(tiff: bytes, enough: int) -> int:
    """Count the numbers in all tags of the first picture, stopping once there are more than `enough`.

    A tag of bytes counts as one. Entries beyond the end of the file are not counted, as Pillow does not read them.
    """
    order = "<" if tiff.startswith(b"II") else ">"
    offset, count, entry = (struct.Struct(order + each) for each in (BIG if tiff[2:3] == b"+" else CLASSIC))
    short = struct.Struct(order + "H")
    directories: list[int] = list(offset.unpack_from(tiff, offset.size))
    numbers = 0
    for at in directories:  # the list grows meanwhile
        led_to = set()
        try:
            (entries,) = count.unpack_from(tiff, at)
            for place in range(at + count.size, at + count.size + entries * entry.size, entry.size):
                tag, kind, length, value = entry.unpack_from(tiff, place)
                numbers += 1 if kind in BYTES else max(1, length)
                if numbers > enough:
                    return numbers
                if tag in DIRECTORIES and tag not in led_to and len(directories) < MAX_DIRECTORIES:
                    led_to.add(tag)
                    inline = short.unpack_from(tiff, place + entry.size - offset.size) if kind == SHORT else (value,)
                    directories += inline
        except (struct.error, OverflowError):
            continue
    return numbers
