"""Mask bits by an entropy coder, for where bytes are dear; it decodes some 300 megabytes of them a second.

Eight weights are a symbol. What is sent is where a mask differs from the first one that the receiver has: the
dispatcher's, where an expert is sent; all on, where there is none. Weights that are on in every mask which the receiver
has change at another rate than the rest, so they come first in a symbol. The mask is cut into blocks; blocks that
change alike share the two rates, and nothing else is learned, so that the tables are known before the first symbol. The
rest is rANS (Duda 2013, arXiv 1311.2540) with four interleaved states, in integers alone: the same on every machine.

    u8 masks used, u16 block, u8 levels, u32 bytes of the blocks' levels | for each level u16 and u16 rates, u8 most
    changes | levels of the blocks as a zstd frame | 4 x u32 states | u16 words
"""

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import zstandard
from numba import njit

from cascade.errors import CascadeError

SCALE = 14  # bits of a probability
LOW = 1 << 16  # a state below it takes a word
FORMS = ((256, 16), (1024, 8), (4096, 4), (32768, 1))  # bytes a block, and levels; the smallest result is sent
_HEAD, _LEVEL = struct.Struct("<BHBI"), struct.Struct("<HHB")
_COUNT = np.array([i.bit_count() for i in range(256)], np.uint8)


class CoderError(CascadeError):
    """Coded bits are not what the coder writes."""


def encode(bits: np.ndarray, known: Sequence[np.ndarray] = ()) -> bytes:
    """Packed bits, uint8 [n], as bytes.

    Args:
        known: uint8 [n] each, the masks that the receiver has; bits are sent as changes of the first, if that helps.
    """
    used = {0, min(1, len(known)), min(255, len(known))}
    forms = [(some, block, min(levels, -(-len(bits) // block))) for some in used for block, levels in FORMS]
    return min((_encode(bits, known, *form) for form in forms), key=len) if len(bits) else b""


def _encode(bits: np.ndarray, known: Sequence[np.ndarray], used: int, block: int, levels: int) -> bytes:
    base, calm = _known(len(bits), known[:used])
    changed = bits ^ base
    starts = np.arange(0, len(changed), block)
    share = np.add.reduceat(_COUNT[changed], starts, dtype=np.int64) / np.diff(starts, append=len(changed))
    level = np.searchsorted(np.quantile(share, np.arange(1, levels) / levels), share, "right").astype(np.uint8)
    each = np.repeat(level, block)[: len(changed)]
    rates, most = np.zeros((levels, 2), np.int64), np.zeros(levels, np.int64)
    for i in range(levels):
        mine, theirs = changed[each == i], calm[each == i]
        if not len(mine):
            continue
        most[i] = _COUNT[mine].max()
        for j, of in enumerate((theirs, ~theirs)):
            rates[i, j] = round(65536 * int(_COUNT[mine & of].sum()) / max(1, int(_COUNT[of].sum())))
    rates = np.clip(rates, 1, 65535)
    gather, _ = _orders()
    contexts = each.astype(np.int64) * 9 + _COUNT[calm]
    states, words = _push(gather[calm, changed], contexts, _table(rates, most))
    packed = zstandard.ZstdCompressor(level=19).compress(level.tobytes())
    table = b"".join(_LEVEL.pack(*rates[i], most[i]) for i in range(levels))
    head = _HEAD.pack(used, block, levels, len(packed))
    return head + table + packed + states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


def decode(data: bytes, size: int, known: Sequence[np.ndarray] = ()) -> np.ndarray:
    """The inverse of :func:`encode`: uint8 [size].

    Raises:
        CoderError: the data was not written by ``encode``, or for other bits than ``known``.
    """
    if not size:
        return np.empty(0, np.uint8)
    try:
        used, block, levels, length = _HEAD.unpack_from(data)
        rates = np.array([_LEVEL.unpack_from(data, _HEAD.size + i * _LEVEL.size) for i in range(levels)], np.int64)
        begin = _HEAD.size + levels * _LEVEL.size
        frame = data[begin : begin + length]
        if used > len(known) or block < 4 or block % 4 or zstandard.frame_content_size(frame) != -(-size // block):
            raise ValueError
        level = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
        states = np.frombuffer(data, "<u4", 4, begin + length).astype(np.uint64)
        words = np.append(np.frombuffer(data, "<u2", offset=begin + length + 16), np.uint16(0))  # one to look ahead at
        if level.max() >= levels or rates[:, :2].min() < 1 or rates[:, 2].max() > 8 or states.min() < LOW:
            raise ValueError
    except (struct.error, ValueError, zstandard.ZstdError):
        raise CoderError("coded bits are damaged: get them again") from None
    base, calm = _known(size, known[:used])
    table = _table(rates[:, :2], rates[:, 2])
    symbols = _symbols(table, 0 if used else 8)
    _, scatter = _orders()
    changed, right = _pull(calm, level, block, table.ravel(), symbols.ravel(), scatter.ravel(), states, words)
    if not right:
        raise CoderError("coded bits are damaged, or for other masks than those given: get them again")
    return np.asarray(changed ^ base)


def _known(size: int, known: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What changes are counted from, and which weights are on everywhere: uint8 [size] both."""
    if any(len(mask) != size for mask in known):
        raise CoderError(f"coded bits of {size} bytes can't be changes of {' '.join(str(len(m)) for m in known)}")
    if not len(known):
        return (np.full(size, 255, np.uint8),) * 2
    return known[0], np.bitwise_and.reduce(known)


@njit(nogil=True, cache=True)
def _table(rates: np.ndarray, most: np.ndarray) -> np.ndarray:  # pragma: no cover - compiled
    """Frequency << 16 | first slot of each symbol, uint32 [9 * levels, 256]; context 9 l + k: level l, k weights calm.

    Args:
        rates: how often a calm weight, and another, changes, in 1 / 65536, int64 [levels, 2].
        most: changes that a symbol of the level has at most, int64 [levels].
    """
    frequency = np.zeros((9 * len(rates), 256), np.uint32)
    for context in range(len(frequency)):
        level, calm = context // 9, context % 9
        allowed, rest = sum([_COUNT[symbol] <= most[level] for symbol in range(256)]), 1 << SCALE
        for symbol in range(256):
            if _COUNT[symbol] <= most[level]:
                weight = 1 << 32
                for i in range(8):
                    rate = rates[level, 0 if i < calm else 1]
                    weight = weight * (rate if symbol >> i & 1 else 65536 - rate) >> 16
                frequency[context, symbol] = (weight * ((1 << SCALE) - allowed) >> 32) + 1
                rest -= int(frequency[context, symbol])
        frequency[context, 0] += rest
        first = 0
        for symbol in range(256):
            often = frequency[context, symbol]
            frequency[context, symbol] = often << 16 | first
            first += often
    return frequency


@cache
def _orders() -> tuple[np.ndarray, np.ndarray]:
    """A byte with those bits first that are set in another, and back: both uint8 [256 others, 256 bytes]."""
    byte = np.arange(256)
    order = np.argsort(~(byte[:, None] >> np.arange(8)) & 1, axis=1, kind="stable")  # [256, 8]
    gather = ((byte[:, None] >> order[:, None, :] & 1) << np.arange(8)).sum(axis=2)
    return gather.astype(np.uint8), np.argsort(gather, axis=1).astype(np.uint8)


@njit(nogil=True, cache=True)
def _push(
    symbols: np.ndarray, contexts: np.ndarray, table: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # pragma: no cover - compiled
    """Last symbol first: the states, and the words in the order in which a decoder takes them."""
    states = np.full(4, LOW, np.uint64)
    words = np.empty(len(symbols) + 1, np.uint16)
    at = len(words)
    for i in range(len(symbols) - 1, -1, -1):
        entry, lane = np.uint64(table[contexts[i], symbols[i]]), i & 3
        often, first = entry >> np.uint64(16), entry & np.uint64(0xFFFF)
        if states[lane] >= often << np.uint64(32 - SCALE):
            at -= 1
            words[at] = states[lane] & np.uint64(0xFFFF)
            states[lane] >>= np.uint64(16)
        states[lane] = (states[lane] // often << np.uint64(SCALE)) + states[lane] % often + first
    return states, words[at:]


@njit(nogil=True, cache=True)
def _symbols(table: np.ndarray, fewest: int) -> np.ndarray:  # pragma: no cover - compiled
    """The symbol of each slot, uint8 [9 * levels, slots]; of contexts with fewer calm weights nothing is written."""
    slots = np.empty((len(table), 1 << SCALE), np.uint8)
    for context in range(len(table)):
        if context % 9 >= fewest:
            for symbol in range(256):
                first = table[context, symbol] & 0xFFFF
                slots[context, first : first + (table[context, symbol] >> 16)] = symbol
    return slots


@njit(inline="always")
def _step(
    state: Any, context: Any, table: np.ndarray, symbols: np.ndarray, words: np.ndarray, at: Any
) -> Any:  # pragma: no cover - compiled
    """Symbol, next state, next word: without a branch, whose wrong guesses would take longer than all the rest."""
    slot = state & np.uint64((1 << SCALE) - 1)
    symbol = np.uint64(symbols[(context << np.uint64(SCALE)) + slot])
    entry = np.uint64(table[(context << np.uint64(8)) + symbol])
    state = (entry >> np.uint64(16)) * (state >> np.uint64(SCALE)) + slot - (entry & np.uint64(0xFFFF))
    word = np.uint64(words[min(at, np.uint64(len(words) - 1))])
    wants = state < np.uint64(LOW)
    return symbol, state << np.uint64(16) | word if wants else state, at + np.uint64(wants)


@njit(nogil=True, cache=True)
def _pull(
    calm: np.ndarray,
    level: np.ndarray,
    block: int,
    table: np.ndarray,
    symbols: np.ndarray,
    scatter: np.ndarray,
    states: np.ndarray,
    words: np.ndarray,
) -> tuple[np.ndarray, bool]:  # pragma: no cover - compiled
    """The changes, and whether all words but the last were taken and each state is what it began with.

    All indices are unsigned and all tables flat, for numba looks at the sign of the others.
    """
    out = np.empty(len(calm), np.uint8)
    byte: Any = np.uint64(8)
    s0, s1, s2, s3, at = states[0], states[1], states[2], states[3], np.uint64(0)
    for b in range(len(level)):
        context = np.uint64(level[b]) * np.uint64(9)
        end = min(len(calm), (b + 1) * block)
        for j in range(b * block, end - 3, 4):  # a block begins with state 0
            i0, i1, i2, i3 = np.uint64(j), np.uint64(j + 1), np.uint64(j + 2), np.uint64(j + 3)
            k0, k1, k2, k3 = np.uint64(calm[i0]), np.uint64(calm[i1]), np.uint64(calm[i2]), np.uint64(calm[i3])
            c0, s0, at = _step(s0, context + np.uint64(_COUNT[k0]), table, symbols, words, at)
            c1, s1, at = _step(s1, context + np.uint64(_COUNT[k1]), table, symbols, words, at)
            c2, s2, at = _step(s2, context + np.uint64(_COUNT[k2]), table, symbols, words, at)
            c3, s3, at = _step(s3, context + np.uint64(_COUNT[k3]), table, symbols, words, at)
            out[i0], out[i1] = scatter[(k0 << byte) + c0], scatter[(k1 << byte) + c1]
            out[i2], out[i3] = scatter[(k2 << byte) + c2], scatter[(k3 << byte) + c3]
        for j in range(end - end % 4, end):  # the mask's last few
            k0 = np.uint64(calm[np.uint64(j)])
            c0, s0, at = _step(s0, context + np.uint64(_COUNT[k0]), table, symbols, words, at)
            out[np.uint64(j)] = scatter[(k0 << byte) + c0]
            s0, s1, s2, s3 = s1, s2, s3, s0
    return out, at == len(words) - 1 and s0 == s1 == s2 == s3 == LOW
