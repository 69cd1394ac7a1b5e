"""The swap on a GPU: packed bits and pristine weights in, masked and scaled weights out, in one launch.

It is bound by memory: per weight it reads four bytes and a bit, and writes four bytes (bfloat16: two). So a tile's
weights begin at a multiple of sixteen, threads load vectors, and the scales, a few for each tile, come from the cache.
Triton's interpreter runs the same code without a GPU: set TRITON_INTERPRET=1 before triton is imported. The plain
reference is ``WeightLayout.materialize_plain``.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from cascade.kernels.materialize import cut

WORD = 16
"""Weights that share a word of bits; each unit of a flat buffer begins with one."""

TILE = 2048
"""Weights of a program: sixteen a thread, that is four vectors of four under way at once."""

FIELDS = 6
LONGEST = 1 << 20  # weights of a row, or of a block of rows: up to here the kernel's division in float32 is exact


Numbers = Sequence[int] | np.ndarray


def tiles(begin: Numbers, rows: Numbers, pieces: Numbers, blocks: Numbers) -> Tensor:
    """The programs of a launch, int32 [tiles, FIELDS]: how the weights of each lie among rows. Alike for all masks.

    Args:
        begin: where each unit begins, multiples of WORD, and the end of the last; counted from the first.
        rows: index of each unit's first scale.
        pieces: weights of one row of each unit, or of one block of rows.
        blocks: rows of a block, see ``weight_layout.BlockOrder``.
    """
    assert max(pieces, default=0) <= LONGEST and begin[-1] < 1 << 31, "indices are 32 bits"
    edges, row, piece, block = (np.asarray(values, np.int64) for values in (begin, rows, pieces, blocks))
    starts, _, unit = cut(edges[:-1], edges[1:], TILE)
    nth, place = np.divmod(starts - edges[unit], piece[unit])
    fields = starts, edges[unit + 1], place, row[unit] + nth * block[unit], piece[unit], block[unit]
    return torch.from_numpy(np.stack(fields, axis=1).astype(np.int32))


def masked(bits: Tensor, weights: Tensor, table: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write ``W * M * scale`` into ``out``; zeros into the padding behind a unit.

    Args:
        bits: packed bits, uint8 [n / 8], zero where there is padding.
        weights: pristine, float32 [n].
        table: see ``tiles``, on the same device.
        scales: float32 [rows].
        out: float32 or bfloat16 [n], rounded to nearest.
    """
    if not len(table):
        return
    with torch.cuda.device_of(out):  # Triton launches on the current one
        _masked[(len(table),)](bits.view(torch.int16), weights, table, scales, out, TILE=TILE, num_warps=4)


@triton.jit
def _masked(bits, weights, table, scales, out, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = table + tl.program_id(0) * 6  # FIELDS
    # Multiples of a word, or loads and stores could not be vectors.
    begin = tl.multiple_of(tl.load(entry), 16)
    size = tl.multiple_of(tl.load(entry + 1), 16) - begin
    place, row, piece, block = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    # One dimension, so that bits and weights have one layout: no value moves between threads. The threads that read
    # one word of bits are neighbors in a warp, which loads it once.
    at = tl.arange(0, TILE)
    lane = at % 16
    weight = tl.load(weights + begin + at, mask=at < size, other=0.0)
    active = (tl.load(bits + begin // 16 + at // 16, mask=at < size, other=0).to(tl.int32) >> lane) & 1
    # A division of integers takes some twenty instructions; a half added, the float can't fall short of a whole one.
    nth = ((place + at).to(tl.float32) + 0.5) * (1.0 / piece.to(tl.float32))
    # Where there is padding no bit is set, so no row is read that does not exist.
    scale = tl.load(scales + row + nth.to(tl.int32) * block + lane % block, mask=active != 0, other=0.0)
    tl.store(out + begin + at, (weight * scale).to(out.dtype.element_ty), mask=at < size)
