"""Images of any source as pixels: decoded once, and cropped for each bundle's preprocessing."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cascade.engine.results import ItemError
from cascade.model.decoding import ImageError, Limits, convert, decode, read
from cascade.model.preprocessing import Preprocessing

Source = bytes | bytearray | str | Path | Image.Image | Tensor
MAX_PIXEL = 1000  # normalized pixels are within about +-20; very large ones make a network return NaN


def pixels_of(image: Source, wanted: Sequence[Preprocessing], limits: Limits) -> list[Tensor] | ItemError:
    """The pixels for each preprocessing, as in ``Item``, or the image's error."""
    if isinstance(image, Tensor):
        wrong = next((why for p in wanted if (why := _wrong(image, p.size))), None)
        return ItemError("bad_pixels", wrong) if wrong else [image] * len(wanted)
    try:
        opened = _open(image, limits)
        return [crop_of(preprocessing)(opened) for preprocessing in wanted]
    except ImageError as error:
        return ItemError(error.kind, str(error))


@cache
def crop_of(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """The resize and crop of a preprocessing, cached."""
    return preprocessing.crop()


def _wrong(pixels: Tensor, size: int) -> str | None:
    """Why these pixels are not a valid input for a backbone that takes squares of ``size``; None if they are."""
    if pixels.dtype != torch.float32 or pixels.shape != (3, size, size):
        return f"pixels are {pixels.dtype} {list(pixels.shape)}: this bundle takes float32 [3, {size}, {size}]"
    within = pixels.abs() <= MAX_PIXEL  # also False for NaN
    return None if within.all() else f"pixels lie outside of +-{MAX_PIXEL}: send preprocessed ones"


def _open(image: bytes | bytearray | str | Path | Image.Image, limits: Limits) -> Image.Image:
    if isinstance(image, Image.Image):
        return convert(image, limits)
    if isinstance(image, str | Path):
        return read(Path(image), limits)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(image, limits)
    kinds = "a file's bytes, a path, a PIL image (Image.fromarray makes one) or a float32 tensor [3, H, W]"
    raise ImageError("not_an_image", f"{type(image).__name__} is no kind of image: give {kinds}")
