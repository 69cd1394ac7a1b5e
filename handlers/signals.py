"""Signals of all servers: SIGTERM, Ctrl-C and a closed terminal (SIGHUP) drain a server and stop it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


def on_stop(stop: Callable[[], None]) -> None:
    """Call ``stop`` in the main thread at each SIGTERM, SIGINT and SIGHUP."""
    for number in _stop_signals():
        signal.signal(number, lambda number, frame: stop())


def exit_on_signals(status: int = 0) -> None:
    """Raise SystemExit with ``status`` at the first SIGTERM, SIGINT or SIGHUP; ignore the later ones."""

    def leave() -> NoReturn:
        for number in _stop_signals():
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(status)

    on_stop(leave)


@contextmanager
def deferred() -> Iterator[None]:
    """Defer SIGTERM, SIGINT and SIGHUP until the end of the block.

    So a child process is never started without the code that will stop it.
    """
    pending: list[int] = []
    handlers = {n: signal.signal(n, lambda number, frame: pending.append(number)) for n in _stop_signals()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for caught in pending:
            signal.raise_signal(caught)


def _stop_signals() -> list[signal.Signals]:
    """The stop signals, without SIGHUP if it is ignored: nohup ignores it, so that a program outlives its terminal."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *(() if ignored else (signal.SIGHUP,))]
