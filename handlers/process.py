"""A child process with all its descendants, as one thing to start and to end.

The child leads its own session, so that Ctrl-C in a terminal reaches only us and we end it in our own order;
the kernel kills it when we die, even by SIGKILL; and to end it is to kill and reap every descendant.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cascade.errors import CascadeError

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

# Runs in the child and turns into the command. A program of its own rather than `preexec_fn`, which may
# deadlock where the parent has threads. The check of the parent closes the gap before prctl.
LAUNCHER = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class ProcessError(CascadeError):
    """A child cannot be ended."""


def start(
    command: Sequence[str], env: Mapping[str, str], cwd: Path, stdout: IO[bytes], stderr: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start `command`, an absolute path and its arguments.

    Call it in the main thread: the kernel takes the end of the *thread* that started the child for our death.
    """
    # Orphaned grandchildren become our children, so that we can reap them.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid())]
    return subprocess.Popen(
        [*launcher, *command],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


@contextmanager
def signals_later() -> Iterator[None]:
    """What would end the program in the block ends it after the block: a child is there with what will end it."""
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {n: signal.signal(n, lambda number, frame: came.append(number)) for n in numbers}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in came:
            signal.raise_signal(number)


def kill(process: subprocess.Popen[bytes], timeout: float = 10) -> None:
    """Kill the process and its descendants, and return when none is left, not even a zombie.

    Raises ProcessError if the kernel does not let go of one (a hung disk or GPU driver).
    """
    end = time.monotonic() + timeout
    while True:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # again each time: one may just have been forked
        except ProcessLookupError:
            process.wait()
            return
        process.poll()
        _reap(process.pid)
        if time.monotonic() > end:
            raise ProcessError(
                f"process group {process.pid} does not end: see what it waits for with ps -eo pgid,wchan,cmd"
            )
        time.sleep(0.01)


def _reap(group: int) -> None:
    try:
        while os.waitpid(-group, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass
