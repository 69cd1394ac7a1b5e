"""Decoding: one test for each row of docs/inputs.md."""

import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from PIL.WebPImagePlugin import WebPImageFile
from sklearn.datasets import load_sample_image

from cascade.errors import CascadeError
from cascade.model.decoding import LIMITS, UPRIGHT, ImageError, Limits, convert, decode, read
from cascade.model.preprocessing import Preprocessing

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A real photograph, 640 x 427."""
    return Image.fromarray(load_sample_image("china.jpg"))


def encode(image: Image.Image, fmt: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, color: int, rows: bytes = b"", before: bytes = b"") -> bytes:
    """A PNG written by hand: Pillow writes neither 16-bit color nor a header without pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + data + chunk(b"IEND", b"")


def png16(pixels: np.ndarray, before: bytes = b"") -> bytes:
    """uint16 [H, W] or [H, W, channels] as a 16-bit PNG."""
    height, width, channels = pixels.reshape(*pixels.shape[:2], -1).shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows, before)


def refusal(data: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(ImageError) as e:
        decode(data, limits)
    assert isinstance(e.value, CascadeError) and "\n" not in str(e.value)
    assert ": " in str(e.value), "the message says what to do"
    return e.value.kind


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of any channel of any pixel."""
    assert a.mode == b.mode == "RGB" and a.size == b.size
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


# Refused with 400


@pytest.mark.parametrize("data", [b"hello, I am no image", b"GIF89a" + bytes(64), b"%PDF-1.7", b"\0", b"RIFF1234WAVE"])
def test_not_an_image(data: bytes) -> None:
    assert refusal(data) == "not_an_image"


@pytest.mark.parametrize("fmt", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_not_an_image(photo: Image.Image, fmt: str) -> None:
    assert refusal(encode(photo, fmt)) == "not_an_image"


def test_empty() -> None:
    assert refusal(b"") == "empty"


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.9])
def test_truncated(photo: Image.Image, fmt: str, kept: float) -> None:
    data = encode(photo, fmt)
    assert refusal(data[: 12 + int(kept * len(data))]) == "truncated"


def test_damaged(photo: Image.Image) -> None:
    data = bytearray(encode(photo))
    data[len(data) // 2] ^= 1
    assert refusal(bytes(data)) == "truncated"


# Refused with 413, before a pixel is decoded


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any attempt to decode pixels fails the test."""
    calls: list[object] = []
    for reader in (ImageFile.ImageFile, WebPImageFile):
        monkeypatch.setattr(reader, "load", lambda self: calls.append(self))
    yield
    assert not calls


@pytest.mark.usefixtures("undecoded")
def test_too_many_bytes(photo: Image.Image) -> None:
    data = encode(photo, "JPEG")
    assert refusal(data, Limits(max_bytes=len(data) - 1)) == "too_large"
    assert refusal(bytes(LIMITS.max_bytes + 1)) == "too_large"


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize("side", [6_400, 10_000, 14_000])  # Pillow keeps silent, warns, raises
def test_decompression_bomb(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(png(side, side, 1, 0)) == "too_many_pixels"


def test_real_decompression_bomb() -> None:
    """49 megapixels that came in 6 KB, and a good image of the same make just below the limit."""
    assert len(bomb := encode(Image.new("1", (7_000, 7_000)), optimize=True)) < 10_000
    assert refusal(bomb) == "too_many_pixels"
    assert decode(encode(Image.new("1", (6_300, 6_300)))).size == (6_300, 6_300)


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize("size", [(20_000, 100), (100, 20_000), (20_000, 20_000)])
def test_20_000_pixels_wide(size: tuple[int, int]) -> None:
    assert refusal(png(*size, 8, 2)) == "too_wide"


@pytest.mark.usefixtures("undecoded")
def test_one_pixel_high_and_very_long() -> None:
    """The resize of the shorter side would make 256 x 4 million pixels of it."""
    assert refusal(png(16_000, 1, 8, 2)) == "too_wide"


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_limits_hold_in_every_format(photo: Image.Image, fmt: str) -> None:
    data = encode(photo, fmt)
    assert refusal(data, Limits(max_pixels=640 * 427 - 1)) == "too_many_pixels"
    assert refusal(data, Limits(max_side=639)) == "too_wide"
    assert refusal(data, Limits(max_aspect=1)) == "too_wide"


# Accepted and converted


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_plain_formats_as_pillow_reads_them(photo: Image.Image, fmt: str) -> None:
    """JPEG at full resolution: no draft mode, which would change the pixels."""
    data = encode(photo, fmt)
    assert difference(decode(data), Image.open(BytesIO(data)).convert("RGB")) == 0
    assert difference(decode(bytearray(data)), decode(memoryview(data))) == 0


def test_16_bit_gray_is_scaled(photo: Image.Image) -> None:
    """Clipping at 255 would make a white image of it."""
    gray = photo.convert("L")
    for deep in (np.asarray(gray).astype(np.uint16) * 257, np.asarray(gray).astype(np.uint16) * 256 + 90):
        assert difference(decode(png16(deep)), gray.convert("RGB")) <= 1


def test_16_bit_color(photo: Image.Image) -> None:
    deep = np.asarray(photo).astype(np.uint16) * 257
    assert difference(decode(png16(deep)), photo) <= 1
    opaque = np.dstack([deep, np.full(deep.shape[:2], 65535, np.uint16)])
    assert difference(decode(png16(opaque)), photo) <= 1


def test_16_bit_gray_with_a_transparent_value() -> None:
    pixels = np.array([[0, 30_000, 65_535]], np.uint16)
    found = np.asarray(decode(png16(pixels, before=chunk(b"tRNS", struct.pack(">H", 30_000)))))[0, :, 0]
    assert found.tolist() == [0, 255, 255]


def test_cmyk(photo: Image.Image) -> None:
    data = encode(photo.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert Image.open(BytesIO(data)).mode == "CMYK"
    assert difference(decode(data), photo) <= 12


def test_palette(photo: Image.Image) -> None:
    palette = photo.quantize(64)
    assert difference(decode(encode(palette)), palette.convert("RGB")) == 0


def test_palette_with_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 90])
    palette.putdata([0, 1])
    found = np.asarray(decode(encode(palette, transparency=0)))
    assert found.tolist() == [[[255, 255, 255], [0, 0, 90]]]


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_alpha_on_white(photo: Image.Image, fmt: str) -> None:
    alpha = np.linspace(0, 255, photo.width).astype(np.uint8)[None].repeat(photo.height, 0)
    data = encode(Image.fromarray(np.dstack([np.asarray(photo), alpha])), fmt, lossless=True, exact=True)
    weight = alpha[..., None] / 255
    expected = np.asarray(photo) * weight + 255 * (1 - weight)
    assert np.abs(np.asarray(decode(data)) - expected).max() <= 1


def test_gray_with_alpha() -> None:
    pixels = Image.new("LA", (2, 1), (0, 0))
    pixels.putpixel((1, 0), (40, 255))
    assert np.asarray(decode(encode(pixels))).tolist() == [[[255] * 3, [40] * 3]]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_gray(photo: Image.Image, mode: str) -> None:
    gray = photo.convert(mode)
    assert difference(decode(encode(gray)), gray.convert("RGB")) == 0


@pytest.mark.parametrize("color", ["red", (1, 2, 3)])
def test_one_pixel(color: Any) -> None:
    image = decode(encode(Image.new("RGB", (1, 1), color)))
    assert image.getpixel((0, 0)) == Image.new("RGB", (1, 1), color).getpixel((0, 0))
    preprocessing = Preprocessing(224, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert preprocessing.transform()(image).shape == (3, 224, 224)


def test_exif_rotated(photo: Image.Image) -> None:
    """Stored turned, with the orientation that undoes it: the same picture as the upright one."""
    for orientation, upright in UPRIGHT.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        undo = {
            Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
            Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
        }
        stored = photo.transpose(undo.get(upright, upright))
        lossless = encode(stored, "PNG", exif=exif)
        assert difference(decode(lossless), photo) == 0
        jpeg = encode(stored, "JPEG", quality=95, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(BytesIO(jpeg)))
        assert difference(decode(jpeg), expected) == 0
        apart = np.abs(np.asarray(decode(jpeg), np.int16) - np.asarray(photo, np.int16))
        assert apart.mean() < 3, "up to the JPEG's own loss the upright photo"


def test_nobody_turns_it_twice(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = decode(encode(photo, "JPEG", exif=exif))
    assert image.size == (427, 640)
    assert ImageOps.exif_transpose(image).size == (427, 640)


def test_unreadable_exif_is_taken_as_upright(photo: Image.Image) -> None:
    data = encode(photo, "JPEG", exif=b"Exif\0\0 no tiff header at all")
    assert difference(decode(data), decode(encode(photo, "JPEG"))) == 0


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_animation_gives_its_first_frame(photo: Image.Image, fmt: str) -> None:
    frames = [ImageOps.invert(photo), ImageOps.mirror(photo)]
    data = encode(photo, fmt, save_all=True, append_images=frames, lossless=True)
    assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 3
    assert difference(decode(data), photo) == 0


# Files


def test_read_says_what_is_wrong_with_the_path(photo: Image.Image, tmp_path: Path) -> None:
    good, missing, link, pipe = (tmp_path / name for name in ("a.png", "missing.png", "link.png", "pipe.png"))
    good.write_bytes(encode(photo))
    link.symlink_to(tmp_path / "gone.png")
    os.mkfifo(pipe)
    assert difference(read(good), photo) == 0
    for path in (missing, link, pipe, tmp_path):
        with pytest.raises(ImageError, match=path.name) as e:
            read(path)
        assert e.value.kind == "unreadable"
    with pytest.raises(ImageError) as e:
        read(good, Limits(max_bytes=100))
    assert e.value.kind == "too_large"


# The process around it


def test_pillow_is_left_as_it_was(photo: Image.Image) -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    decode(encode(photo))
    refusal(png(14_000, 14_000, 1, 0))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_many_threads_at_once(photo: Image.Image) -> None:
    turned = Image.Exif()
    turned[ORIENTATION] = 8
    good = [encode(photo, "JPEG", exif=turned), encode(photo, "WEBP"), encode(photo.quantize(32))]
    expected = [decode(data) for data in good]
    barrier = threading.Barrier(8)

    def work(thread: int) -> bool:
        barrier.wait()
        same = [difference(decode(good[(thread + i) % 3]), expected[(thread + i) % 3]) == 0 for i in range(6)]
        with pytest.raises(ImageError, match="megapixels"):
            decode(png(10_000, 10_000, 1, 0))
        return all(same)

    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # what others left open may be collected just now
        assert all(pool.map(work, range(8)))


def test_an_opened_image_is_treated_like_a_file() -> None:
    """Limits, transparency and orientation do not depend on who opened it; the caller's image stays as it is."""
    clear = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    turned = Image.new("RGB", (8, 4), "red")
    turned.getexif()[0x0112] = 6
    assert convert(clear).getpixel((0, 0)) == (255, 255, 255)
    assert convert(turned).size == (4, 8)
    assert clear.mode == "RGBA" and turned.getexif()[0x0112] == 6
    with pytest.raises(ImageError) as refused:
        convert(Image.new("1", (20_000, 10)))
    assert refused.value.kind == "too_wide"
