"""Remove metadata from PNG and JPEG files before they are decoded.

Pillow reads text, color profiles and EXIF into Python objects. It refuses images with large ones, although every viewer
shows them, and joins many small ones in quadratic time. Here the headers are walked once, in linear time, and only what
determines the pixels is kept.
"""

import re
import struct

from cascade.errors import CascadeError

MAX_SEGMENTS = 65_536  # PNG chunks, or JPEG segments before the first scan
MAX_EXIF = 16  # EXIF segments of a JPEG; one holds up to 64 KiB
PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND"})
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # except RST, which has no segment; fill bytes are skipped
SOI, EOI, SOS, APP0, APP1, APP14, APP15, COM = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE


class TooComplex(CascadeError):
    """The file consists of more pieces than any real image."""


def png_pixels(data: bytes) -> bytes:
    """A PNG file without the chunks that do not change the first frame's pixels.

    Raises:
        TooComplex: more than MAX_SEGMENTS chunks.
    """
    pieces, start, position = [], 0, 8
    for _ in range(MAX_SEGMENTS):
        if position + 12 > len(data):
            break
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        if end > len(data):
            break  # truncated: Pillow reports it
        if data[position + 4 : position + 8] not in PNG_KEPT:
            pieces.append(data[start:position])
            start = end
        position = end
    else:
        raise TooComplex(f"the PNG has more than {MAX_SEGMENTS} chunks")
    return b"".join([*pieces, data[start:]]) if pieces else data


def jpeg_pixels(data: bytes) -> tuple[bytes, int]:
    """A JPEG file without the segments that do not change its pixels, and its number of scans.

    Of application data, only JFIF, Adobe and EXIF segments are kept: the first two give the color space, the third the
    orientation.

    Raises:
        TooComplex: more than MAX_SEGMENTS segments before the first scan.
    """
    pieces, exif, position = [data[:2]], 0, 2
    for _ in range(MAX_SEGMENTS):
        if not (marker := MARKER.search(data, position)):
            return b"".join(pieces), 0  # no scan: Pillow reports it
        start, kind = marker.start(), data[marker.start() + 1]
        if kind == SOS:
            scans = data[start:]
            # In compressed data 0xFF is followed by 0x00, so counting the markers counts the scans exactly.
            return b"".join([*pieces, scans]), scans.count(b"\xff\xda")
        if kind in (SOI, EOI) or kind < 0xC0:
            pieces.append(data[start : start + 2])
            position = start + 2
            continue
        if start + 4 > len(data):
            return b"".join(pieces), 0
        (length,) = struct.unpack_from(">H", data, start + 2)
        position = start + 2 + max(length, 2)
        payload = data[start + 4 : start + 10]
        if kind == APP1 and payload == b"Exif\0\0":
            exif += 1
            wanted = exif <= MAX_EXIF
        elif kind in (APP0, APP14):
            wanted = payload[:5] in (b"JFIF\0", b"Adobe")
        else:
            wanted = not (APP0 <= kind <= APP15 or kind == COM)
        if wanted:
            pieces.append(data[start:position])
    raise TooComplex(f"the JPEG has more than {MAX_SEGMENTS} segments")
