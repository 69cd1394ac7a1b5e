"""Decode an image file to an upright RGB image.

Images are untrusted. Format, size and number of scans are checked before any pixel is decoded, and every failure is an
``ImageError`` that says what to do. docs/inputs.md lists the outcomes; tests/cascade/model/test_decoding.py tests
each row.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageFile
from PIL.ExifTags import Base as Exif
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cascade.errors import CascadeError
from cascade.model.image_metadata import TooComplex, jpeg_pixels, png_pixels


class ImageError(CascadeError):
    """One image cannot be used.

    Attributes:
        kind: a short name for programs; it stays the same when the message changes.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Limits:
    """Limits on untrusted images, checked before any pixel is decoded.

    Attributes:
        max_bytes: size of the file as sent.
        max_pixels: width times height; a decoded pixel takes 4 bytes.
        max_side: pixels of the longer side.
        max_aspect: longer side over shorter side. The resize that follows fits the *shorter* side: it would turn
            1 x 16,384 pixels into 256 x 4,194,304.
        max_scans: scans of a progressive JPEG; encoders write about 10. Each scan visits every pixel, however few bytes
            it has.
        max_scanned: pixels times scans.
        max_seconds: CPU time of decoding; the largest images that the other limits allow take about one second. Checked
            whenever the decoder asks for more bytes; in servers, ``cascade.engine.decoders`` enforces it at any time.
    """

    max_bytes: int = 16 * 2**20
    max_pixels: int = 40_000_000
    max_side: int = 16_384
    max_aspect: int = 100
    max_scans: int = 64
    max_scanned: int = 800_000_000
    max_seconds: float = 3


LIMITS = Limits()
JPEG_BLOCK = 16 * 1024  # bytes given to the decoder at a time; its CPU time is checked before each block

# The transpose that makes an image upright, by EXIF orientation.
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def decode(data: bytes | bytearray | memoryview, limits: Limits = LIMITS) -> Image.Image:
    """Decode a JPEG, PNG or WebP file to an upright RGB image; of an animation, the first frame.

    EXIF orientation is applied, transparency is composited on white, 16 bits are scaled to 8; palettes, gray and
    CMYK are converted. Color profiles are ignored, as in timm. Thread-safe.

    Raises:
        ImageError: see docs/inputs.md.
    """
    if not len(data):
        raise ImageError("empty", "the image has zero bytes: send the content of an image file")
    if len(data) > limits.max_bytes:
        raise too_large(len(data), limits)
    opener = _opener(bytes(data[:12]))
    with _damage_named():
        scans, pixels, block = 1, bytes(data), ImageFile.MAXBLOCK
        if opener is JpegImageFile:
            pixels, scans = jpeg_pixels(pixels)
            block = JPEG_BLOCK
        elif opener is PngImageFile:
            pixels = png_pixels(pixels)
        with opener(_BoundedTime(pixels, limits.max_seconds, block)) as im:  # headers only
            _check_size(im.size, limits)
            _check_scans(im.size, scans, limits)
            _scale_transparency(im, pixels)
            return convert(im, limits)


class _BoundedTime(BytesIO):
    """A file that the decoder reads block by block, until its CPU time is used up."""

    def __init__(self, data: bytes, seconds: float, block: int) -> None:
        super().__init__(data)
        self.seconds, self.block = seconds, block
        self.end = time.thread_time() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self.end:
            raise too_slow(self.seconds)
        return super().read(self.block if size == ImageFile.MAXBLOCK else size)


def convert(im: Image.Image, limits: Limits = LIMITS) -> Image.Image:
    """``decode`` for an image already opened by Pillow; ``im`` is not changed."""
    _check_size(im.size, limits)
    with _damage_named():
        im.load()
        return _upright(im, _rgb(im))


@contextmanager
def _damage_named() -> Iterator[None]:
    """Turn whatever a decoder raises into an ImageError."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except TooComplex as e:
        raise ImageError("too_complex", f"{e}: save it again without metadata") from e
    except Image.DecompressionBombError as e:  # Pillow's own, higher limit, checked while it reads a WebP header
        raise ImageError("too_many_pixels", f"{e}: send a smaller image") from e
    except Exception as e:  # hostile bytes make decoders fail in every way: OSError, SyntaxError, struct.error, ...
        raise ImageError("truncated", f"the image is truncated or damaged ({e}): send the whole file") from e


def read(path: Path, limits: Limits = LIMITS) -> Image.Image:
    """``decode`` of a file.

    Raises:
        ImageError: as in ``decode`` and ``load``.
    """
    return decode(load(path, limits), limits)


def load(path: Path, limits: Limits = LIMITS) -> bytes:
    """Read a file that may be an image.

    Raises:
        ImageError: "unreadable" if it is missing, not readable or not a regular file; "too_large".
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            os.scandir(path).close()  # raises if the folder cannot be listed
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
            raise ImageError("unreadable", f"{path} is not a regular file: pass an image file")
        if status.st_size > limits.max_bytes:
            raise too_large(status.st_size, limits)
        with path.open("rb") as file:
            return file.read(limits.max_bytes + 1)  # the file may have grown since
    except OSError as e:
        raise ImageError("unreadable", f"{path} cannot be read ({e.strerror}): check the path") from e
    except ValueError as e:  # a NUL in the name
        raise ImageError("unreadable", f"{str(path)!r} cannot be read ({e}): check the path") from e


def too_large(size: int, limits: Limits) -> ImageError:
    """The error for a file of ``size`` bytes."""
    mib = 2**20
    message = f"the image has {size / mib:.1f} MiB, the limit is {limits.max_bytes / mib:g}: send a smaller file"
    return ImageError("too_large", message)


def too_slow(seconds: float) -> ImageError:
    """The error for an image that takes more CPU time than ``seconds``."""
    message = f"the image takes more than {seconds:g} s to decode: save it again as a baseline JPEG or a PNG"
    return ImageError("too_complex", message)


def _opener(head: bytes) -> Callable[[BytesIO], ImageFile.ImageFile]:
    """Pillow's reader for the format, chosen by the first bytes.

    The three readers are called directly. Image.open applies a process-wide limit by warning or raising, and catching
    warnings is not thread-safe.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WebPImageFile
    raise ImageError("not_an_image", "this is not a JPEG, PNG or WebP image: convert it to one of them")


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    sides = f"the image is {width} x {height} pixels"
    if max(size) > limits.max_side:
        raise ImageError("too_wide", f"{sides}, the limit is {limits.max_side} per side: send a smaller one")
    if width * height > limits.max_pixels:
        limit = f"{limits.max_pixels / 1e6:g} megapixels"
        raise ImageError("too_many_pixels", f"{sides}, the limit is {limit}: send a smaller one")
    if max(size) > limits.max_aspect * min(size):
        limit = f"{limits.max_aspect} times the other"
        raise ImageError("too_wide", f"{sides}, the longer side may be at most {limit}: crop it")


def _check_scans(size: tuple[int, int], scans: int, limits: Limits) -> None:
    most = min(limits.max_scans, max(1, limits.max_scanned // (size[0] * size[1])))
    if scans > most:
        message = f"the JPEG has {scans} scans, the limit at its size is {most}: save it again as a baseline JPEG"
        raise ImageError("too_complex", message)


def _scale_transparency(im: ImageFile.ImageFile, png: bytes) -> None:
    """Scale the transparent value of a PNG with 1, 2 or 4 bits of gray: Pillow scales only the pixels."""
    depth, color = png[24:26] if isinstance(im, PngImageFile) else (8, 0)
    if color == 0 and depth < 8 and isinstance(value := im.info.get("transparency"), int):
        im.info["transparency"] = value * 255 // (2**depth - 1)


def _rgb(im: Image.Image) -> Image.Image:
    """Convert to a new 8-bit RGB image."""
    if im.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion clips at 255 or drops the low byte, by version
        import numpy as np

        deep = np.asarray(im).astype(np.uint32)
        gray = ((deep * 255 + 32767) // 65535).astype(np.uint8)
        gray[deep == im.info.get("transparency", -1)] = 255
        return Image.fromarray(gray).convert("RGB")
    if im.has_transparency_data:
        transparent = im.convert("RGBA")
        white = Image.new("RGB", im.size, "white")
        white.paste(transparent, mask=transparent.getchannel("A"))
        return white
    return im.convert("RGB")


def _upright(im: Image.Image, rgb: Image.Image) -> Image.Image:
    """``rgb`` rotated by the EXIF orientation of ``im``, without metadata, so that it is not rotated twice."""
    try:
        orientation = im.getexif().get(Exif.Orientation)
    except Exception:  # the pixels are fine even if the metadata is damaged
        orientation = None
    rgb.info.clear()
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb
