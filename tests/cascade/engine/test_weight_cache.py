"""WeightCache: a budget in bytes that is never exceeded, and what leaves is gone."""

import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError

Make = Callable[[Tensor | None], Tensor]


def making(value: float, size: int = 100) -> Make:
    """Makes ``size`` bytes, into the buffer where there is one."""

    def make(out: Tensor | None) -> Tensor:
        return torch.full((size // 4,), float(value)) if out is None else out.fill_(value)

    return make


def never(out: Tensor | None) -> Tensor:
    raise AssertionError("it was there already")


def test_holds_what_fits_and_makes_each_once() -> None:
    held = WeightCache(250)
    first = held.get("a", 100, making(1))
    assert held.get("b", 100, making(2)).tolist() == [2.0] * 25
    assert held.get("a", 100, never) is first
    assert ("a" in held, "b" in held, "c" in held) == (True, True, False)
    assert (held.used, held.hits, held.misses, held.evictions) == (200, 1, 2, 0)


def test_the_least_recently_used_leaves() -> None:
    held = WeightCache(200)
    for key in "abab":
        held.get(key, 100, making(0))
    held.get("a", 100, never)
    held.get("c", 100, making(3))
    assert ("a" in held, "b" in held, "c" in held) == (True, False, True)
    assert (held.used, held.hits, held.misses, held.evictions) == (200, 3, 3, 1)


def test_a_buffer_of_the_same_size_is_written_again() -> None:
    held = WeightCache(100)
    address = held.get("a", 100, making(1)).data_ptr()
    again = held.get("b", 100, making(2))
    assert again.data_ptr() == address
    assert again.tolist() == [2.0] * 25


def test_a_buffer_of_another_size_is_not() -> None:
    held = WeightCache(200)
    held.get("a", 100, making(1))
    held.get("b", 40, making(2, 40))
    offered: list[Tensor | None] = []

    def make(out: Tensor | None) -> Tensor:
        offered.append(out)
        return torch.zeros(40)

    held.get("c", 160, make)
    assert offered == [None]
    assert held.used == 160 + 40 and "a" not in held and "b" in held


def test_used_never_exceeds_the_budget_and_what_left_is_freed() -> None:
    held = WeightCache(260)
    made: list[tuple[weakref.ref[Tensor], int]] = []

    def alive(apart: Tensor | None = None) -> int:
        tensors = [(ref(), size) for ref, size in made]
        return sum({id(t): size for t, size in tensors if t is not None and t is not apart}.values())

    def making_tracked(size: int) -> Make:
        def make(out: Tensor | None) -> Tensor:
            assert alive(apart=out) + size <= held.budget, "evicted weights live on while new ones are made"
            tensor = torch.zeros(size // 4) if out is None else out
            made.append((weakref.ref(tensor), size))
            return tensor

        return make

    for key, size in enumerate([100, 40, 100, 60, 120, 40, 260, 20, 100, 100, 240]):
        held.get(key, size, making_tracked(size))
        assert held.used <= held.budget
        assert alive() == held.used


def test_too_small_a_budget_says_what_it_takes() -> None:
    held = WeightCache(99)
    with pytest.raises(CascadeError, match="the budget of 99 bytes is below one mask's weights: allow at least 100"):
        held.get("a", 100, never)
    assert (held.used, held.misses, held.evictions) == (0, 0, 0)


def test_a_make_that_fails_holds_nothing() -> None:
    def broken(out: Tensor | None) -> Tensor:
        raise MemoryError

    held = WeightCache(100)
    held.get("a", 100, making(1))
    with pytest.raises(MemoryError):
        held.get("b", 100, broken)
    assert held.used == 0 and "a" not in held and "b" not in held
    assert held.get("b", 100, making(2)).tolist() == [2.0] * 25
    assert held.used == 100


def test_clear() -> None:
    held = WeightCache(200)
    refs = [weakref.ref(held.get(key, 100, making(0))) for key in "ab"]
    held.clear()
    assert held.used == 0 and held.evictions == 2
    assert [ref() for ref in refs] == [None, None]


# --- made ahead


def test_what_comes_next_is_made_beside_what_is_in_use() -> None:
    held, started, go = WeightCache(200), threading.Event(), threading.Event()

    def slow(out: Tensor | None) -> Tensor:
        started.set()
        assert go.wait(60)
        return making(2)(out)

    held.get("a", 100, making(1))
    assert held.prefetch("b", 100, slow)
    assert started.wait(60) and "b" in held and held.used == 200
    assert not held.prefetch("c", 100, never), "one at a time"
    go.set()
    assert held.get("b", 100, never).tolist() == [2.0] * 25
    assert (held.misses, held.hits, held.evictions) == (2, 0, 0)


def test_what_is_in_use_stays() -> None:
    """The mask in use is the one used least recently among those held, and must not be written over."""
    held = WeightCache(200)
    first = held.get("a", 100, making(1))
    held.get("b", 100, making(2))
    assert held.get("a", 100, never) is first
    assert held.prefetch("c", 100, making(3))
    assert held.get("c", 100, never).tolist() == [3.0] * 25
    assert first.tolist() == [1.0] * 25 and "a" in held and "b" not in held


def test_no_room_beside_what_is_in_use() -> None:
    held = WeightCache(199)
    held.get("a", 100, making(1))
    assert not held.prefetch("b", 100, never)
    assert held.used == 100 and held.misses == 1
    assert not held.prefetch("a", 100, never), "it is there"


def test_a_failure_ahead_is_raised_when_it_is_asked_for() -> None:
    def broken(out: Tensor | None) -> Tensor:
        raise MemoryError

    held = WeightCache(200)
    held.get("a", 100, making(1))
    assert held.prefetch("b", 100, broken)
    with pytest.raises(MemoryError):
        held.get("b", 100, broken)
    assert held.used == 100 and "a" in held and "b" not in held


def test_the_budget_holds_with_what_is_made_ahead() -> None:
    held = WeightCache(250)
    for key in "abcabcab":
        held.get(key, 100, making(0))
        held.prefetch("next", 100, making(1))
        assert held.used <= 250
    held.clear()
    assert held.used == 0
