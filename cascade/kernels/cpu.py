"""The fused swap on a CPU: packed bits and pristine weights in, masked and scaled weights out, in one pass.

Numba compiles it in about a second when it is first used. The plain references are in ``cascade.masks``.
"""

import numpy as np
from numba import njit, prange

PIECE = 1 << 16  # weights that a thread takes at a time: 256 kB in, 256 kB out, which stay in its cache


def masked(bits: np.ndarray, weights: np.ndarray, bounds: np.ndarray, out: np.ndarray) -> None:
    """Write ``W * M / alpha`` into ``out``.

    Args:
        bits: packed bits, uint8 [ceil(n / 8)].
        weights: pristine, float32 [n].
        bounds: where each segment (with an alpha of its own) begins, and n, int64 [segments + 1].
        out: float32 [n].
    """
    sizes = np.diff(bounds)
    scales = 1 / np.sqrt(np.maximum(_count(bits, bounds), 1) / sizes)
    pieces = -(-sizes // PIECE)
    segment = np.repeat(np.arange(len(sizes)), pieces)
    first = np.arange(len(segment)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = bounds[segment] + first * PIECE
    end = np.minimum(begin + PIECE, bounds[segment + 1])
    _masked(bits, weights, begin, end, scales.astype(np.float32)[segment], out)


@njit(parallel=True, nogil=True)
def _count(bits: np.ndarray, bounds: np.ndarray) -> np.ndarray:  # pragma: no cover - compiled
    """Active weights of each segment."""
    out = np.zeros(len(bounds) - 1, np.int64)
    for s in prange(len(out)):
        i, end, total = bounds[s], bounds[s + 1], 0
        while i < end and i & 7:
            total += (bits[i >> 3] >> (i & 7)) & 1
            i += 1
        while i + 8 <= end:
            byte = np.uint32(bits[i >> 3])
            pairs = byte - ((byte >> 1) & 0x55)
            fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
            total += int((fours + (fours >> 4)) & 0x0F)
            i += 8
        while i < end:
            total += (bits[i >> 3] >> (i & 7)) & 1
            i += 1
        out[s] = total
    return out


@njit(parallel=True, nogil=True)
def _masked(
    bits: np.ndarray, weights: np.ndarray, begin: np.ndarray, end: np.ndarray, scales: np.ndarray, out: np.ndarray
) -> None:  # pragma: no cover - compiled
    """Each piece [begin, end) with its scale."""
    for p in prange(len(begin)):
        i, stop, scale = begin[p], end[p], scales[p]
        while i < stop and i & 7:
            out[i] = weights[i] * (scale * np.float32((bits[i >> 3] >> (i & 7)) & 1))
            i += 1
        for q in range(i >> 3, stop >> 3):  # whole bytes: the inner loop becomes vector code
            byte, o = np.uint32(bits[q]), q << 3
            for k in range(8):
                out[o + k] = weights[o + k] * (scale * np.float32((byte >> k) & 1))
        i = max(i, stop & ~7)
        while i < stop:
            out[i] = weights[i] * (scale * np.float32((bits[i >> 3] >> (i & 7)) & 1))
            i += 1
