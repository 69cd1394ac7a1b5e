"""The swap on a CPU: packed bits and pristine weights in, masked and scaled weights out, in one pass over memory.

Numba compiles the loops on first use and caches them next to this file, or in the user's cache. The plain references
are ``materialize_plain`` and ``weight_layout.reorder_plain``.
"""

import os
import threading
from typing import Any

import numpy as np
from llvmlite import ir

from cascade.cpus import cpu_count

os.environ.setdefault("NUMBA_NUM_THREADS", str(cpu_count()))  # read once, at import: numba ignores a container's quota
# isort: split

from numba import njit, prange, types
from numba.extending import intrinsic

LANES = 16
"""Weights per step: one 16-bit word of bits, and with AVX-512 one vector register of float32."""

_lock = threading.Lock()  # without OpenMP, numba ends the process if two threads call it at once

STREAM = 1 << 24
"""Bytes from which the output bypasses the caches: it is too large to stay in them until it is read."""


def masked(
    bits: np.ndarray, weights: np.ndarray, begin: np.ndarray, end: np.ndarray, scales: np.ndarray, out: np.ndarray
) -> None:
    """Write ``W * M * scale`` into ``out``, piece by piece; gaps between pieces are not written.

    Args:
        bits: packed bits, uint8 [ceil(n / 8)].
        weights: pristine, float32 [n].
        begin, end: of each piece, int64 [P].
        scales: float32 [P, 16]; a weight at position i takes that of lane ``i % 16``.
        out: float32 [n].
    """
    words = bits[: len(bits) // 2 * 2].view(np.uint16)
    past_caches = out.nbytes >= STREAM and out.ctypes.data % (4 * LANES) == 0
    with _lock:
        _masked(words, bits, weights, begin, end, scales, past_caches, out)


def signed(
    bits: np.ndarray,
    weights: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    scales: np.ndarray,
    deltas: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write ``W * scale + s * delta`` into ``out``, with s = 1 where the bit is set and -1 elsewhere.

    Args:
        deltas: float32 [P, 16], like ``scales``. The other arguments are those of :func:`masked`.
    """
    words = bits[: len(bits) // 2 * 2].view(np.uint16)
    past_caches = out.nbytes >= STREAM and out.ctypes.data % (4 * LANES) == 0
    with _lock:
        _signed(words, bits, weights, begin, end, scales, deltas, past_caches, out)


def reorder(bits: np.ndarray, tasks: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    """Reorder bits from the order of ``Backbone.weights`` to an executor's, see ``weight_layout.BlockOrder``.

    Args:
        bits: uint8, as in a ``Mask``.
        tasks: int64 [T, 8]; no two tasks write to the same byte. Fields: where the unit's bits begin, the task's first
            row, rows of the unit, groups of rows, rows per group (1, 8 or 16), columns of the unit, begin and end of
            its range in ``columns``. The tasks' outputs are consecutive, each aligned to a multiple of 16.
        columns: int32; the canonical column of each place, -1 for padding.
        out: uint8, zeros.
    """
    with _lock:
        _reorder(bits, tasks, columns, out)


def _make_step(nontemporal: bool, sign: bool = False) -> Any:
    """An intrinsic ``step(out, weights, scale, delta, at, word)`` for 16 weights at once.

    With ``sign`` it writes ``weights * scale`` plus or minus ``delta``. Without ``sign`` it writes ``weights * scale``
    or 0, and does not read ``delta``.

    LLVM does not vectorize a loop over single bits well enough to reach memory speed, so the three vector operations
    are spelled out. They are target independent: a masked multiply with AVX-512, a few more instructions elsewhere.
    """
    lanes, bools = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(1), LANES)

    @intrinsic
    def step(typing: Any, out: Any, weights: Any, scale: Any, delta: Any, at: Any, word: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def place(which: int, index: Any = None) -> Any:
                array = context.make_array(signature.args[which])(context, builder, arguments[which])
                pointer = builder.gep(array.data, [index]) if index is not None else array.data
                return builder.bitcast(pointer, lanes.as_pointer())

            def load(pointer: Any) -> Any:
                value = builder.load(pointer)
                value.align = 4
                return value

            fuse = ("contract",) if sign else ()  # one fused multiply-add
            product = builder.fmul(load(place(1, arguments[4])), load(place(2)), flags=fuse)
            word = builder.bitcast(arguments[5], bools)
            if sign:
                delta = load(place(3))
                result = builder.fadd(product, builder.select(word, delta, builder.fneg(delta)), flags=fuse)
            else:
                result = builder.select(word, product, ir.Constant(lanes, [0.0] * LANES))
            store = builder.store(result, place(0, arguments[4]))
            store.align = 4 * LANES if nontemporal else 4
            if nontemporal:
                store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
            return context.get_dummy_value()

        return types.void(out, weights, scale, delta, types.int64, types.uint16), code

    return step


_step, _step_past_caches = _make_step(False), _make_step(True)
_sign_step, _sign_step_past_caches = _make_step(False, sign=True), _make_step(True, sign=True)


@njit(parallel=True, nogil=True, cache=True)
def _masked(
    words: np.ndarray,
    bits: np.ndarray,
    weights: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    scales: np.ndarray,
    past_caches: bool,
    out: np.ndarray,
) -> None:  # pragma: no cover - compiled
    for p in prange(len(begin)):
        i, stop, scale = begin[p], end[p], scales[p]
        while i < stop and i & 15:
            out[i] = weights[i] * (scale[i & 15] * np.float32((bits[i >> 3] >> (i & 7)) & 1))
            i += 1
        whole = max(i, stop & ~15)
        if past_caches:
            for word in range(i >> 4, whole >> 4):
                _step_past_caches(out, weights, scale, scale, word << 4, words[word])
        else:
            for word in range(i >> 4, whole >> 4):
                _step(out, weights, scale, scale, word << 4, words[word])
        for k in range(whole, stop):
            out[k] = weights[k] * (scale[k & 15] * np.float32((bits[k >> 3] >> (k & 7)) & 1))


@njit(parallel=True, nogil=True, cache=True)
def _signed(
    words: np.ndarray,
    bits: np.ndarray,
    weights: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    scales: np.ndarray,
    deltas: np.ndarray,
    past_caches: bool,
    out: np.ndarray,
) -> None:  # pragma: no cover - compiled
    for p in prange(len(begin)):
        i, stop, scale, delta = begin[p], end[p], scales[p], deltas[p]
        while i < stop and i & 15:
            out[i] = weights[i] * scale[i & 15] + delta[i & 15] * np.float32(((bits[i >> 3] >> (i & 7)) & 1) * 2 - 1.0)
            i += 1
        whole = max(i, stop & ~15)
        if past_caches:
            for word in range(i >> 4, whole >> 4):
                _sign_step_past_caches(out, weights, scale, delta, word << 4, words[word])
        else:
            for word in range(i >> 4, whole >> 4):
                _sign_step(out, weights, scale, delta, word << 4, words[word])
        for k in range(whole, stop):
            out[k] = weights[k] * scale[k & 15] + delta[k & 15] * np.float32(((bits[k >> 3] >> (k & 7)) & 1) * 2 - 1.0)


@njit(parallel=True, nogil=True, cache=True)
def _reorder(
    bits: np.ndarray, tasks: np.ndarray, columns: np.ndarray, out: np.ndarray
) -> None:  # pragma: no cover - compiled
    places = np.zeros(len(tasks) + 1, np.int64)
    for t in range(len(tasks)):
        size = tasks[t, 3] * tasks[t, 4] * (tasks[t, 7] - tasks[t, 6])
        places[t + 1] = (places[t] + size + 15) & ~15
    for t in prange(len(tasks)):
        origin, first, rows, groups, block, width = (
            tasks[t, 0],
            tasks[t, 1],
            tasks[t, 2],
            tasks[t, 3],
            tasks[t, 4],
            tasks[t, 5],
        )
        place = places[t]
        lanes = np.zeros(width, np.uint16)  # for each column, the bits of the group's rows
        for group in range(groups):
            lanes[:] = 0
            for lane in range(min(block, rows - first - group * block)):
                at = origin + (first + group * block + lane) * width
                if at & 7 == 0 and width & 7 == 0:
                    for byte in range(width >> 3):
                        value = np.uint16(bits[(at >> 3) + byte])
                        for k in range(8):
                            lanes[(byte << 3) + k] |= ((value >> k) & np.uint16(1)) << lane
                else:
                    for k in range(width):
                        lanes[k] |= np.uint16((bits[(at + k) >> 3] >> ((at + k) & 7)) & 1) << lane
            for v in range(tasks[t, 6], tasks[t, 7]):
                word = lanes[columns[v]] if columns[v] >= 0 else np.uint16(0)
                if block == 16:
                    out[place >> 3] = word & 255
                    out[(place >> 3) + 1] = word >> 8
                elif block == 8:
                    out[place >> 3] = word
                else:
                    out[place >> 3] |= word << (place & 7)
                place += block
    return
