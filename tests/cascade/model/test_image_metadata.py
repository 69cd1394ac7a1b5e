"""Metadata of any size changes neither pixels nor the time to decode them."""

import struct
import time
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from cascade.model.decoding import LIMITS, ImageError, Limits, decode
from cascade.model.image_metadata import MAX_SEGMENTS, jpeg_pixels, png_pixels

PHOTO = Image.fromarray(load_sample_image("china.jpg")).resize((64, 48))


def encode(format: str, **options: object) -> bytes:
    PHOTO.save(file := BytesIO(), format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def kind_of(data: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(ImageError) as error:
        decode(data, limits)
    return error.value.kind


BIG = zlib.compress(b"p" * 2 * 2**20)


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"iCCP", b"printer\0\0" + BIG),
        chunk(b"zTXt", b"Comment\0\0" + BIG),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BIG),
        b"".join(chunk(b"zTXt", b"C%d\0\0" % i + zlib.compress(b"x" * 1_000_000)) for i in range(70)),
    ],
    ids=["profile", "text", "xmp", "many texts"],
)
def test_a_png_with_large_metadata_has_the_pixels_of_one_without(metadata: bytes) -> None:
    plain = encode("PNG")
    assert decode(plain[:33] + metadata + plain[33:]) == decode(plain)
    assert png_pixels(plain) == plain


def test_many_exif_segments_take_linear_time() -> None:
    plain = encode("JPEG")
    start = time.process_time()
    assert decode(plain[:2] + segment(0xE1, b"Exif\0\0a") * 60_000 + plain[2:]) == decode(plain)
    assert time.process_time() - start < 2
    assert kind_of(plain[:2] + segment(0xE1, b"Exif\0\0a") * (MAX_SEGMENTS + 1) + plain[2:]) == "too_complex"
    png = encode("PNG")
    assert kind_of(png[:33] + chunk(b"tEXt", b"a\0b") * (MAX_SEGMENTS + 1) + png[33:]) == "too_complex"


def test_what_decides_the_pixels_of_a_jpeg_is_kept() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode("JPEG", exif=exif, icc_profile=bytes(100_000), comment=b"x" * 50_000)
    assert decode(turned).size == PHOTO.size[::-1]
    pixels, scans = jpeg_pixels(turned)
    assert scans == 1 and len(pixels) < len(turned) - 150_000
    cmyk = BytesIO()
    PHOTO.convert("CMYK").save(cmyk, "JPEG", quality=100, subsampling=0)
    difference = np.asarray(decode(cmyk.getvalue()), int) - np.asarray(PHOTO, int)
    assert np.abs(difference).max() <= 12, "Adobe's segment says that the colors are inverted"


def test_fill_bytes_and_garbage_take_linear_time() -> None:
    plain = encode("JPEG")
    start = time.process_time()
    assert decode(plain[:2] + b"\xff" * 2**23 + plain[2:]) == decode(plain)
    assert kind_of(b"\xff\xd8" + b"\xff" * 2**23) == "truncated"
    assert time.process_time() - start < 2


def test_scans_are_bounded_before_a_pixel_is_decoded() -> None:
    progressive = encode("JPEG", progressive=True)
    _, scans = jpeg_pixels(progressive)
    assert 5 < scans < 20 and decode(progressive).size == PHOTO.size
    assert kind_of(progressive, Limits(max_scans=scans - 1)) == "too_complex"
    assert kind_of(progressive, Limits(max_scanned=64 * 48 * (scans - 1))) == "too_complex"


def empty_scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose refinement scans hold nothing; each one visits every coefficient all the same."""
    tables = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    for table, symbol in ((b"\x00", b"\0"), (b"\x10", b"\xe0")):
        tables += segment(0xC4, table + bytes([1] + [0] * 15) + symbol)
    runs = -(-(((side + 7) // 8) ** 2) // (2**15 - 1))
    bits = ("0" + "1" * 14) * runs
    bits += "1" * (-len(bits) % 8)
    raw = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    first = segment(0xDA, b"\1\1\0\0\0\1") + segment(0xDA, b"\1\1\0\1\x3f\1") + raw
    return b"\xff\xd8" + tables + first + (segment(0xDA, b"\1\1\0\1\x3f\x10") + raw) * count + b"\xff\xd9"


def test_thousands_of_empty_scans_cost_nothing() -> None:
    start = time.process_time()
    assert kind_of(empty_scans(2048, 3000)) == "too_complex"
    assert time.process_time() - start < 1


def test_decoding_has_a_time_budget() -> None:
    many = Limits(max_scans=10**6, max_scanned=10**15, max_seconds=0.2)
    start = time.process_time()
    assert kind_of(empty_scans(1024, 20_000), many) == "too_complex"
    assert time.process_time() - start < 5


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_transparent_gray_of_any_depth_becomes_white(depth: int) -> None:
    values = [0, 1] if depth == 1 else [0, 1, 2, 3]
    bits = "".join(format(value, f"0{depth}b") for value in values)
    bits += "0" * (-len(bits) % 8)
    row = b"\0" + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", len(values), 1, depth, 0, 0, 0, 0)
    for transparent in values:
        png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", transparent))
        png += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
        expected = [255 if value == transparent else value * 255 // (2**depth - 1) for value in values]
        assert np.asarray(decode(png))[0, :, 0].tolist() == expected
