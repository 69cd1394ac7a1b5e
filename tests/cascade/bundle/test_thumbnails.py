"""Thumbnails: small, never enlarged, the same bytes for the same pixels, and the same picture again."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.bundle.thumbnails import LIMITS, SIDE, make, media_type
from cascade.model.decoding import decode


def test_pictures_come_back_in_their_order(cifar: list[Image.Image]) -> None:
    pictures = make(cifar[:30])
    assert len(pictures) == 30 and [*pictures.inconsistencies()] == []
    for row, image in enumerate(cifar[:30]):
        found = decode(pictures[row], LIMITS)
        assert found.size == image.size == (32, 32)
        error = np.asarray(found, np.float32) - np.asarray(image, np.float32)
        others = [np.abs(np.asarray(found, np.float32) - np.asarray(other, np.float32)).mean() for other in cifar[:30]]
        assert np.abs(error).mean() < 20 and int(np.argmin(others)) == row
        assert media_type(pictures[row]) == "image/webp"
    for row in (-1, 30):
        with pytest.raises(IndexError):
            pictures[row]
    again = make(cifar[:30])
    assert torch.equal(again.data, pictures.data) and torch.equal(again.offsets, pictures.offsets)


@pytest.mark.parametrize(("size", "small"), [((640, 480), (64, 48)), ((20, 2000), (1, 64)), ((8, 8), (8, 8))])
def test_large_ones_shrink_and_keep_their_shape(cifar: list[Image.Image], size: tuple[int, int], small: object) -> None:
    image = cifar[0].resize(size)
    file = make([image])[0]
    assert decode(file, LIMITS).size == small and image.size == size
    assert max(decode(file).size) <= SIDE and len(file) < LIMITS.max_bytes


def test_media_types(cifar: list[Image.Image]) -> None:
    for kind in ("jpeg", "png", "webp"):
        cifar[0].save(out := BytesIO(), kind)
        assert media_type(out.getvalue()) == f"image/{kind}"
