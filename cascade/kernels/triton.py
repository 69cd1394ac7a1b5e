"""The swap on a GPU: packed bits and pristine weights in, masked and scaled weights out, in one launch.

It is memory-bound: per weight it reads four bytes and a bit, and writes four bytes (bfloat16: two). So a tile's weights
begin at a multiple of sixteen, threads load vectors, and the few scales of each tile come from the cache.
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
"""Weights that share a word of bits; each unit of a flat buffer begins at a word."""

TILE = 2048
"""Weights per program: sixteen per thread, that is four vectors of four in flight."""

FIELDS = 6
LONGEST = 1 << 20  # most weights of a row or a block of rows for which the kernel's division in float32 is exact


Numbers = Sequence[int] | np.ndarray


def tiles(begin: Numbers, rows: Numbers, pieces: Numbers, blocks: Numbers) -> Tensor:
    """The programs of a launch, int32 [tiles, FIELDS]: which rows the weights of each belong to. Shared by all masks.

    Args:
        begin: where each unit begins, relative to the first, in multiples of WORD; and the end of the last unit.
        rows: index of each unit's first scale.
        pieces: for each unit, the weights of one row, or of one block of rows.
        blocks: rows of a block, see ``weight_layout.BlockOrder``.
    """
    assert max(pieces, default=0) <= LONGEST and begin[-1] < 1 << 31, "indices are 32 bits"
    edges, row, piece, block = (np.asarray(values, np.int64) for values in (begin, rows, pieces, blocks))
    starts, _, unit = cut(edges[:-1], edges[1:], TILE)
    nth, place = np.divmod(starts - edges[unit], piece[unit])
    fields = starts, edges[unit + 1], place, row[unit] + nth * block[unit], piece[unit], block[unit]
    return torch.from_numpy(np.stack(fields, axis=1).astype(np.int32))


def masked(bits: Tensor, weights: Tensor, table: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write ``W * M * scale`` into ``out``, and zeros into the padding after each unit.

    Args:
        bits: packed bits, uint8 [n / 8], zero for padding.
        weights: pristine, float32 [n].
        table: see ``tiles``, on the same device.
        scales: float32 [rows].
        out: float32 or bfloat16 [n], rounded to nearest.
    """
    if not len(table):
        return
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _masked[(len(table),)](bits.view(torch.int16), weights, table, scales, out, TILE=TILE, num_warps=4)


def signed(bits: Tensor, weights: Tensor, table: Tensor, scales: Tensor, steps: Tensor, out: Tensor) -> None:
    """Write ``W * scale + step`` into ``out`` where the bit is set and ``W * scale - step`` elsewhere: a 1-bit delta.

    Args:
        steps: float32 [rows]; the other arguments are those of ``masked``. In padding, ``out`` is undefined.
    """
    if not len(table):
        return
    with torch.cuda.device_of(out):
        words, rows = bits.view(torch.int16), len(scales)
        _signed[(len(table),)](words, weights, table, scales, steps, rows, out, TILE=TILE, num_warps=4)


@triton.jit
def _tile(bits, weights, table, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's places in the buffer and which of them exist, their weights and bits, and their rows."""
    entry = table + tl.program_id(0) * 6  # FIELDS
    # Without these hints loads and stores would not be vectorized.
    begin = tl.multiple_of(tl.load(entry), 16)
    size = tl.multiple_of(tl.load(entry + 1), 16) - begin
    place, row, piece, block = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    # One dimension, so that bits and weights share a layout and no value moves between threads. The threads that read
    # the same word of bits are neighbors in a warp, which loads it once.
    at = tl.arange(0, TILE)
    there, lane = at < size, at % 16
    weight = tl.load(weights + begin + at, mask=there, other=0.0)
    active = (tl.load(bits + begin // 16 + at // 16, mask=there, other=0).to(tl.int32) >> lane) & 1
    # Integer division takes about twenty instructions. Adding a half keeps the float from falling below a whole number.
    nth = ((place + at).to(tl.float32) + 0.5) * (1.0 / piece.to(tl.float32))
    return begin + at, there, weight, active, row + nth.to(tl.int32) * block + lane % block


@triton.jit
def _masked(bits, weights, table, scales, out, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    at, there, weight, active, row = _tile(bits, weights, table, TILE)
    # Padding has no bit set, so no row beyond the last is read.
    scale = tl.load(scales + row, mask=active != 0, other=0.0)
    tl.store(out + at, (weight * scale).to(out.dtype.element_ty), mask=there)


@triton.jit
def _signed(bits, weights, table, scales, steps, rows, out, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    at, there, weight, active, row = _tile(bits, weights, table, TILE)
    real = there & (row < rows)  # padding may lie behind the last row
    scale, step = tl.load(scales + row, mask=real, other=0.0), tl.load(steps + row, mask=real, other=0.0)
    value = weight * scale + tl.where(active != 0, step, -step)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=there)
