"""A program that is told to end cleans up, once."""

import signal
import subprocess
import sys

import pytest

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
