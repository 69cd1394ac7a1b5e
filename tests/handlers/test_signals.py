"""Signals stop a program in order, once, and not in the middle of a start."""

import signal
import subprocess
import sys

import pytest

from handlers.signals import deferred
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_in_order_and_once(number: int) -> None:
    program = """
import signal, time
from handlers.signals import exit_on_signals
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # nohup, and a shell's background, have them ignored
exit_on_signals()
try:
    print("up", flush=True)
    time.sleep(60)
finally:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    print("cleaned up", flush=True)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        child.send_signal(number)
        assert child.stdout.readline() == "cleaned up\n"
    assert child.returncode == 0


def test_a_signal_during_a_start_comes_after_it() -> None:
    started: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    try:
        with pytest.raises(SystemExit), deferred():
            signal.raise_signal(signal.SIGTERM)
            started.append("child")
        assert started == ["child"]
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    program = """
import signal
from handlers.signals import on_stop
signal.signal(signal.SIGHUP, signal.SIG_IGN)
on_stop(lambda: print("stop", flush=True))
signal.raise_signal(signal.SIGHUP)
signal.raise_signal(signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "stop\n"
