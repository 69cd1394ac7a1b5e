"""Undo what a test run inherits, so that tests pass however they are started: nohup, cron, CI, another locale or shell.

``reset`` runs before any conftest is loaded (tests/environment.py). Child processes inherit the result.
"""

import atexit
import os
import resource
import shutil
import signal
import tempfile
import time

from tests.helpers.paths import ROOT

FILES = 4096
"""Soft limit of open files, where the hard limit allows as many."""
DROPPED = (
    "MAKE",  # `make test` passes its options on to a make inside a test
    "CASCADE_",
    "RAY_",
    "PROMETHEUS_",
    "TS_",
    "JAVA_",
    "JDK_JAVA_",
    "XDG_",
    "LC_",
    "OMP_",
    "MKL_",
    "NUMBA_",
    "OPENBLAS_",
)
"""Beginnings of the names of variables that change what is tested."""
DROPPED_NAMES = {"TRITON_INTERPRET", "FORCE_COLOR", "NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES"} | {
    name for scheme in ("http", "https", "all", "no", "ftp") for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())
}


def reset() -> None:
    """Signals, umask, limits, home folder, time zone, language and environment, as on a new machine."""
    _signals()
    _limits()
    os.umask(0o022)
    for name in list(os.environ):
        if name.startswith(DROPPED) or name in DROPPED_NAMES:
            del os.environ[name]
    if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has the controller's home
        os.environ["HOME"] = tempfile.mkdtemp(prefix="home-")
        atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
    os.environ |= {"LANG": "C.UTF-8", "TZ": "UTC", "PYTHONPATH": str(ROOT)}
    time.tzset()


def _signals() -> None:
    """A shell ignores SIGINT for jobs in the background, nohup ignores SIGHUP, and children would inherit both.

    A handler is not inherited, so with one that does nothing we keep ignoring the signal and our children don't.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    ignored = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        elif number not in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these two itself
            signal.signal(number, lambda *_: None)


def _limits() -> None:
    for kind, wanted in ((resource.RLIMIT_NOFILE, FILES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
