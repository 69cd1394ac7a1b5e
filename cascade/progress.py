"""Progress on stderr: a bar in a terminal, otherwise a line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
Advance = Callable[[int, int | None], object]
"""Takes the number of finished items, and the total, or None while it is unknown."""

EVERY = 10  # seconds between two lines


@contextmanager
def progress(what: str) -> Iterator[Advance]:
    """Yield a function to call after each item or batch. Its first call gives the items done before the start."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with _bar(what) as advance:
            yield advance
    else:
        yield _lines(what)


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield the items and show progress."""
    with progress(what) as advance:
        advance(0, total)
        for done, item in enumerate(items, 1):
            yield item
            advance(done, total)


@contextmanager
def _bar(what: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as shown:
        task, rate, first = shown.add_task(what, total=None, rate=""), _rate(), True

        def advance(done: int, total: int | None) -> None:
            nonlocal first
            if first:  # items of an earlier run say nothing about the rate
                first = False
                shown.reset(task, completed=done, total=total, rate="")
            speed = rate(done)
            shown.update(task, completed=done, total=total, rate=f"{speed:.1f}/s" if speed else "")

        yield advance


def _lines(what: str) -> Advance:
    rate, last = _rate(), time.monotonic()

    def advance(done: int, total: int | None) -> None:
        nonlocal last
        speed = rate(done)
        if time.monotonic() - last < EVERY:
            return
        last = time.monotonic()
        left = f", {(total - done) / speed:.0f} s left" if total and speed else ""
        of = f" of {total}" if total else ""
        print(f"{what}: {done}{of}, {speed:.1f}/s{left}", file=sys.stderr, flush=True)

    return advance


def _rate() -> Callable[[int], float]:
    """Items per second since the first call."""
    before, start = -1, time.monotonic()

    def rate(done: int) -> float:
        nonlocal before, start
        if before < 0:
            before, start = done, time.monotonic()
        return (done - before) / max(time.monotonic() - start, 1e-9) if done > before else 0.0

    return rate
