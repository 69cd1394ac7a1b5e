"""A child process with all its descendants, started and killed as one process group.

The child leads its own session, so Ctrl-C in a terminal reaches only the parent, which stops the child in an orderly
way. The kernel kills the child when the parent dies, even by SIGKILL. Killing it kills and reaps the whole group.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from cascade.errors import CascadeError

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ROOT = Path(__file__).parents[1]
"""The folder of our packages."""

# Runs in the child and execs the command. It is a separate program because `preexec_fn` may deadlock if the parent has
# threads. The parent may have died before prctl, hence the check.
LAUNCHER = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class ProcessError(CascadeError):
    """A child process cannot be killed."""


def start(
    command: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None = None,
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
    pass_fds: Collection[int] = (),
) -> subprocess.Popen[bytes]:
    """Start ``command``, an absolute path and its arguments.

    Call it in the main thread: the kernel kills the child when the *thread* that started it ends.
    """
    # Orphaned grandchildren become children of this process, so that it can reap them.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid())]
    return subprocess.Popen(
        [*launcher, *command],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=True,
    )


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules, even if the working folder has a package of the same name (-P)."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(threads: int | None = None) -> dict[str, str]:
    """This process's environment, with our packages first in the search path and OpenMP threads that do not spin.

    Spinning threads cost a second per image if another process needs the core.

    Args:
        threads: of OpenMP and numba; None keeps the environment's.
    """
    counts = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    search = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(search), "OMP_WAIT_POLICY": "passive"} | counts


def kill(process: subprocess.Popen[bytes], timeout: float = 10) -> None:
    """Kill the process and its descendants; return when all of them are reaped.

    Raises ProcessError if that takes more than ``timeout`` seconds (a hanging disk or GPU driver).
    """
    end = time.monotonic() + timeout
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(timeout)
        while time.monotonic() < end:
            os.waitpid(-process.pid, os.WNOHANG)
            time.sleep(0.01)
    except ChildProcessError:  # none is left
        return
    except subprocess.TimeoutExpired:
        pass
    raise ProcessError(f"process group {process.pid} does not end: see why with ps -eo pgid,wchan,cmd")
