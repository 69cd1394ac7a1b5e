"""A program that ends in order when it is told to."""

import signal
from types import FrameType
from typing import NoReturn


def exit_on_signals(status: int = 0) -> None:
    """The first SIGTERM, Ctrl-C or closed terminal ends the program in order, with `status`; later ones change nothing.

    A SIGHUP that is ignored already (nohup) stays so.
    """
    ends = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        ends.append(signal.SIGHUP)

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        for each in ends:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(status)

    for each in ends:
        signal.signal(each, leave)
