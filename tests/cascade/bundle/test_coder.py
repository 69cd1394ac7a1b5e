"""The coder gives back what it took, near the entropy of what it knows, and notices what it did not write."""

import lzma
from contextlib import suppress

import numpy as np
import pytest

from cascade.bundle import coder
from cascade.bundle.coder import CoderError


def drawn(share: np.ndarray | float, size: int, seed: int) -> np.ndarray:
    return np.packbits(np.random.default_rng(seed).random(8 * size) < share, bitorder="little")


def entropy(p: np.ndarray) -> float:
    return float(np.mean(-p * np.log2(p) - (1 - p) * np.log2(1 - p)))


@pytest.mark.parametrize("size", [0, 1, 3, 4, 259, 5000])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.999, 1.0])
def test_round_trip(size: int, share: float) -> None:
    bits, known = drawn(share, size, 0), drawn(0.8, size, 1)
    for base in ((), (known,), (bits,), (~bits,), (known, drawn(0.9, size, 2), bits)):
        assert np.array_equal(coder.decode(coder.encode(bits, base), size, base), bits)


def test_it_comes_near_the_entropy() -> None:
    """Blocks of different density, and changes whose rate depends on what was there."""
    share = np.repeat([0.999, 0.9, 0.6, 0.99], 8 * 8000)
    bits = drawn(share, 32_000, 0)
    sent = coder.encode(bits)
    assert len(sent) / len(bits) < 1.02 * entropy(share) < 0.95 * len(lzma.compress(bits.tobytes())) / len(bits)
    on = np.unpackbits(bits, bitorder="little").astype(bool)
    rate = np.where(on, 0.01, 0.2)
    own = bits ^ drawn(rate, 32_000, 1)
    alone = coder.encode(own, [bits])
    assert len(alone) / len(bits) < 1.03 * entropy(rate)
    assert len(coder.encode(bits, [bits])) < 100
    third = own ^ drawn(rate, 32_000, 2)
    third[::2] = own[::2]  # what changed in one mask, changes in the next
    assert len(coder.encode(third, [bits, own])) < 0.9 * len(coder.encode(third, [bits]))
    assert len(coder.encode(bits, [drawn(0.5, 32_000, 3)])) == len(sent), "what does not help is not used"


def test_damage_is_noticed() -> None:
    known = drawn(0.9, 3000, 1)
    bits = known ^ drawn(0.1, 3000, 0)
    sent = coder.encode(bits, [known])
    for wrong in (b"", sent[:5], sent[:-2], sent[:-1], sent + b"\0\0", b"\2" + sent[1:], sent[:1] + b"\1" + sent[2:]):
        with pytest.raises(CoderError, match="damaged"):
            coder.decode(wrong, 3000, [known])
    for size, base in ((3000, ()), (3000, [bits]), (2999, [known]), (6000, ())):
        with pytest.raises(CoderError):
            coder.decode(sent, size, base)
    generator = np.random.default_rng(2)
    for _ in range(200):  # whatever comes, it ends in an error or in bits, never outside of what it was given
        noise = np.frombuffer(sent, np.uint8).copy()
        noise[generator.integers(len(noise), size=3)] = generator.integers(256, size=3)
        with suppress(CoderError):
            assert len(coder.decode(noise.tobytes(), 3000, [known])) == 3000
