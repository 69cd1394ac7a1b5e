"""Thumbnails: small pictures of the training images in a neighbor bank, for a person to look at.

In a bundle by option only (docs/bundle-format.md): what is in there goes to everybody who may use the bundle.
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

from cascade.model.preprocessing import ImageError, Limits, decode

SIDE = 64
LIMITS = Limits(max_bytes=2**14, max_pixels=128 * 128, max_side=128)
"""Of one picture in a bundle that is read; written ones have ``SIDE`` pixels at most."""


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """Encoded pictures, one for each row of the bank.

    Attributes:
        data: uint8 [n], WebP (or PNG, JPEG) files, one after the other.
        offsets: int64 [rows + 1], where each begins, and ``n``.
    """

    layout: ClassVar[dict[str, str]] = {"data": "uint8 n", "offsets": "int64 rows+1"}
    data: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> bytes:
        """The file of a row, from 0. Raises IndexError."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        begin, end = self.offsets[row : row + 2].tolist()
        return self.data[begin:end].numpy().tobytes()

    def take(self, rows: Sequence[int]) -> "Thumbnails":
        """The pictures of these rows."""
        return _joined([self[row] for row in rows])

    def inconsistencies(self) -> Iterator[str]:
        """What is wrong with the first bad one; layout and number of rows are for the bundle to check."""
        places = self.offsets.tolist()
        if places[0] != 0 or places[-1] != len(self.data) or any(b <= a for a, b in pairwise(places)):
            yield f"its offsets do not rise from 0 to {len(self.data)}"
            return
        for row in range(len(self)):
            try:
                decode(self[row], LIMITS)
            except ImageError as error:
                yield f"the picture of row {row}: {error}"
                return


def _joined(files: Sequence[bytes]) -> Thumbnails:
    data = np.frombuffer(b"".join(files), np.uint8).copy()
    offsets = [*accumulate(map(len, files), initial=0)]
    return Thumbnails(torch.from_numpy(data), torch.tensor(offsets, dtype=torch.int64))


def make(images: Iterable[Image.Image]) -> Thumbnails:
    """Thumbnails of RGB images: WebP, ``SIDE`` pixels at most, never enlarged; one libwebp makes the same bytes."""
    files = []
    for image in images:
        small = image.copy()
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.save(out := BytesIO(), "webp", quality=80, method=6)
        files.append(out.getvalue())
    return _joined(files)


def media_type(file: bytes) -> str:
    """Of a picture that was verified."""
    return "image/jpeg" if file[:1] == b"\xff" else "image/png" if file[:1] == b"\x89" else "image/webp"
