"""From bytes to an upright RGB image within stated limits, and from there to the backbone's input.

Images come from strangers: size and format are checked before a pixel is decoded, and whatever is wrong with
one is an ``ImageError`` that says what to do. docs/inputs.md has the table of outcomes, and
tests/cascade/model/test_preprocessing.py a test for each row.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageFile
from PIL.ExifTags import Base as Exif
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cascade.errors import CascadeError

if TYPE_CHECKING:
    import torch


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
    """What is refused before any pixel is decoded.

    Attributes:
        max_bytes: of the file as sent.
        max_pixels: width times height; a decoded pixel takes 4 bytes.
        max_side: pixels of the longer side.
        max_aspect: longer side over shorter. The resize that follows fits the *shorter* side: it would make
            256 x 4,194,304 pixels of 1 x 16,384.
    """

    max_bytes: int = 16 * 2**20
    max_pixels: int = 40_000_000
    max_side: int = 16_384
    max_aspect: int = 100


LIMITS = Limits()

# How EXIF says that a camera was held, and what puts the picture upright.
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
    """The upright RGB image in a JPEG, PNG or WebP file; of an animation the first frame.

    EXIF orientation is applied, transparency composited on white, 16 bits scaled to 8, palettes, gray and
    CMYK converted; color profiles are ignored, as timm ignores them. Safe to call from many threads at once.

    Raises:
        ImageError: 400 or 413, see docs/inputs.md.
    """
    if not len(data):
        raise ImageError("empty", "the image has zero bytes: send the content of an image file")
    if len(data) > limits.max_bytes:
        raise too_large(len(data), limits)
    opener = _opener(bytes(data[:12]))
    with _damage_named(), opener(BytesIO(data)) as im:  # headers only
        return convert(im, limits)


def convert(im: Image.Image, limits: Limits = LIMITS) -> Image.Image:
    """What ``decode`` does with an image that Pillow has opened already; ``im`` stays as it is."""
    _check_size(im.size, limits)
    with _damage_named():
        im.load()
        return _upright(im, _rgb(im))


@contextmanager
def _damage_named() -> Iterator[None]:
    """Whatever a decoder raises, as an ImageError."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as e:  # Pillow's own, higher limit, met inside the WebP header
        raise ImageError("too_many_pixels", f"{e}: send a smaller image") from e
    except Exception as e:  # hostile bytes make decoders fail in every way: OSError, SyntaxError, struct.error, ...
        raise ImageError("truncated", f"the image is truncated or damaged ({e}): send the whole file") from e


def read(path: Path, limits: Limits = LIMITS) -> Image.Image:
    """``decode`` of a file.

    Raises:
        ImageError: as ``decode`` and ``load``.
    """
    return decode(load(path, limits), limits)


def load(path: Path, limits: Limits = LIMITS) -> bytes:
    """The bytes of a file that may be an image.

    Raises:
        ImageError: "unreadable" for what is missing, not readable or no regular file; "too_large".
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise ImageError("unreadable", f"{path} is not a regular file: name an image file")
        if status.st_size > limits.max_bytes:
            raise too_large(status.st_size, limits)
        with path.open("rb") as file:
            return file.read(limits.max_bytes + 1)  # the file may have grown since
    except OSError as e:
        raise ImageError("unreadable", f"{path} cannot be read ({e.strerror}): check the path") from e


def too_large(size: int, limits: Limits) -> ImageError:
    """What is said of a file of ``size`` bytes, read or not."""
    mib = 2**20
    message = f"the image has {size / mib:.1f} MiB, the limit is {limits.max_bytes / mib:g}: send a smaller file"
    return ImageError("too_large", message)


def _opener(head: bytes) -> Callable[[BytesIO], ImageFile.ImageFile]:
    """Pillow's reader for the format that the first bytes announce.

    The three readers are called directly, not through Image.open: that one would warn or raise by a limit
    that is global to the process, and catching a warning is not thread-safe.
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
        raise ImageError("too_wide", f"{sides}, the limit is {limits.max_side} a side: send a smaller one")
    if width * height > limits.max_pixels:
        limit = f"{limits.max_pixels / 1e6:g} megapixels"
        raise ImageError("too_many_pixels", f"{sides}, the limit is {limit}: send a smaller one")
    if max(size) > limits.max_aspect * min(size):
        limit = f"{limits.max_aspect} times the other"
        raise ImageError("too_wide", f"{sides}, the longer side may be at most {limit}: crop it")


def _rgb(im: Image.Image) -> Image.Image:
    """A new 8-bit RGB image."""
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
    """``rgb`` turned as the EXIF data of ``im`` says, and without metadata, lest somebody turns it again."""
    try:
        orientation = im.getexif().get(Exif.Orientation)
    except Exception:  # metadata that nobody can read does not spoil the pixels: every viewer shows them as they are
        orientation = None
    rgb.info.clear()
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the backbone's input: timm's evaluation transform, in the numbers that define it.

    Attributes:
        size: side of the square input, pixels.
        crop_pct: the shorter side is resized to size / crop_pct, then the center is cropped.
        interpolation: one of INTERPOLATIONS.
        mean, std: of RGB in [0, 1].
        crop_mode: one of CROP_MODES; timm has ``center`` for most models.
    """

    size: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if not (isinstance(self.size, int) and self.size >= 1):
            raise CascadeError(f"preprocessing: size must be a whole number of pixels, not {self.size!r}")
        if not 0 < self.crop_pct <= 1:
            raise CascadeError(f"preprocessing: crop_pct must lie in (0, 1], not {self.crop_pct!r}")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise CascadeError(f"preprocessing: interpolation {self.interpolation!r} is none of {known}")
        if self.crop_mode not in CROP_MODES:
            raise CascadeError(f"preprocessing: crop_mode {self.crop_mode!r} is none of {', '.join(CROP_MODES)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise CascadeError("preprocessing: mean and std must be three numbers each, std above 0")

    @classmethod
    def of(cls, backbone_cfg: dict[str, Any], size: int | None = None, crop_pct: float | None = None) -> Preprocessing:
        """The preprocessing of timm's ``model.pretrained_cfg``, at another size or crop where given."""
        from timm.data import resolve_data_config

        config = resolve_data_config(pretrained_cfg=backbone_cfg)
        _, height, width = config["input_size"]
        if size is None and height != width:
            raise CascadeError(
                f"the backbone wants {height} x {width} pixels and only squares are handled: pass a size"
            )
        return cls(
            size=size or height,
            crop_pct=crop_pct or config["crop_pct"],
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            crop_mode=config["crop_mode"],
        )

    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """RGB image -> float32 [3, size, size], bit for bit what timm's evaluation transform gives.

        Pixels become numbers in numpy: torch would start a team of OpenMP threads for that in every thread that
        decodes, and each would fight with the team that passes for the cores.
        """
        import numpy as np
        import torch
        from timm.data import create_transform

        settings = asdict(self)
        whole = create_transform(input_size=(3, settings.pop("size"), self.size), is_training=False, **settings)
        *geometry, _, _ = whole.transforms  # the last two are ToTensor and Normalize
        mean, std = (np.array(each, np.float32)[:, None, None] for each in (self.mean, self.std))

        def transformed(image: Image.Image) -> torch.Tensor:
            for step in geometry:
                image = step(image)
            pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
            pixels /= 255
            pixels -= mean
            pixels /= std
            return torch.from_numpy(pixels)

        return transformed

    def to_json(self) -> dict[str, Any]:
        """Plain types, as they stand in cascade.json."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Preprocessing:
        """The inverse of ``to_json``.

        Raises:
            CascadeError: a field is missing, unknown or out of range.
        """
        try:
            return cls(**data | {"mean": tuple(data["mean"]), "std": tuple(data["std"])})
        except (KeyError, TypeError) as e:
            raise CascadeError(f"preprocessing: {e}: write the bundle again") from e
