"""Thumbnails of the training images in a neighbor bank.

They are optional (docs/bundle-format.md), because everyone with access to the bundle can see them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, pairwise
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.model.decoding import ImageError, Limits, decode

SIDE = 64
LIMITS = Limits(max_bytes=2**14, max_pixels=128 * 128, max_side=128)
"""Limits of one thumbnail when a bundle is read; written ones have at most ``SIDE`` pixels per side."""


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """Encoded images, one per row of the bank.

    Attributes:
        data: uint8 [n], concatenated WebP (or PNG, JPEG) files.
        offsets: int64 [rows + 1], where each file begins, and ``n``.
    """

    layout: ClassVar[dict[str, str]] = {"data": "uint8 n", "offsets": "int64 rows+1"}
    data: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> bytes:
        """The image file of a row, from 0. Raises IndexError."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        begin, end = self.offsets[row : row + 2].tolist()
        return self.data[begin:end].numpy().tobytes()

    def take(self, rows: Sequence[int]) -> "Thumbnails":
        """The thumbnails of these rows."""
        return _joined([self[row] for row in rows])

    def inconsistencies(self) -> Iterator[str]:
        """Yield the first inconsistency; layout and number of rows are checked by the bundle."""
        offsets = self.offsets.tolist()
        if offsets[0] != 0 or offsets[-1] != len(self.data) or any(b <= a for a, b in pairwise(offsets)):
            yield f"its offsets do not increase from 0 to {len(self.data)}"
            return
        for row in range(len(self)):
            try:
                decode(self[row], LIMITS)
            except ImageError as error:
                yield f"the image of row {row}: {error}"
                return


def _joined(files: Sequence[bytes]) -> Thumbnails:
    data = np.frombuffer(b"".join(files), np.uint8).copy()
    offsets = [*accumulate(map(len, files), initial=0)]
    return Thumbnails(torch.from_numpy(data), torch.tensor(offsets, dtype=torch.int64))


def make(images: Iterable[Image.Image]) -> Thumbnails:
    """Make thumbnails of RGB images: WebP, at most ``SIDE`` pixels per side, never enlarged.

    The bytes are reproducible with the same version of libwebp.
    """
    files = []
    for image in images:
        small = image.copy()
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.save(out := BytesIO(), "webp", quality=80, method=6)
        files.append(out.getvalue())
    return _joined(files)


def media_type(file: bytes) -> str:
    """The media type of a verified thumbnail."""
    return "image/jpeg" if file[:1] == b"\xff" else "image/png" if file[:1] == b"\x89" else "image/webp"
