"""Tests do not depend on how they are started: signals, umask, limits, locale, time zone, home, proxies and stdin."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

HOSTILE = {
    "CASCADE_EXECUTOR": "none",
    "COLUMNS": "20",
    "FORCE_COLOR": "1",
    "HOME": "/nonexistent",
    "LANG": "C",
    "LC_ALL": "C",
    "OMP_NUM_THREADS": "64",
    "RAY_ADDRESS": "127.0.0.1:9",
    "TZ": "Pacific/Kiritimati",
    "http_proxy": "http://127.0.0.1:9",
}
START = "trap '' HUP INT TERM; umask 077; ulimit -Sn 200 -Sf 100; exec \"$@\" <&-"
"""As nohup, an ampersand, a careful administrator and a full account would start it, all at once."""
SAMPLE = (
    "tests/test_environment.py::test_inherits_nothing",
    "tests/handlers/test_signals.py",
    "tests/cascade/test_atomic.py",
    "tests/cascade/test_logs.py",
)


def test_passes_however_it_is_started() -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no xdist worker
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *SAMPLE]
    done = subprocess.run(
        ["bash", "-c", START, "bash", *pytest_],
        cwd=ROOT,
        env=outside | HOSTILE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_inherits_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    assert not {"COLUMNS", "FORCE_COLOR", "LC_ALL", "RAY_ADDRESS", "http_proxy"} & os.environ.keys()
    assert os.environ["OMP_NUM_THREADS"] == "1" and os.environ["CASCADE_EXECUTOR"] == "plain"
    assert Path.home().is_dir() and list(Path.home().glob(".bash*")) == []
    assert time.strftime("%Z") == "UTC"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard < 1024 or soft >= 1024
    program = (
        "import os, signal, sys; open('made', 'w').close();"
        "print(*sorted(int(n) for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN))"
    )
    child = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    )
    assert set(map(int, child.stdout.split())) == {signal.SIGPIPE, signal.SIGXFSZ}  # Python's own
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o644
