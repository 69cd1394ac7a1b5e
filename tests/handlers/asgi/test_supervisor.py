"""The supervisor over small programs instead of engines: they get ready, die, hang, or never start."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlers import process
from handlers.asgi import supervisor
from handlers.asgi.supervisor import ServerError, Supervisor, listen
from handlers.settings import AsgiSettings

pytestmark = pytest.mark.slow

SERVE = """
import signal, sys
from handlers import process
from handlers.asgi import supervisor
from handlers.settings import AsgiSettings
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # a background job and nohup ignore them
process.python = lambda module, *arguments: [sys.executable, "-c", sys.argv[1], *arguments]
supervisor.HEARTBEAT_TIMEOUT = 1.0
supervisor.KILL_AFTER = 0.2
try:
    supervisor.serve(AsgiSettings(port=0, startup_timeout=float(sys.argv[2]), drain_timeout=float(sys.argv[3])))
except supervisor.ServerError as error:
    sys.exit(str(error))
"""
ENGINE = """
import json, os, signal, sys, time
options = json.loads(sys.argv[1])
beat = lambda: os.write(options["heartbeat"], b".")
print(options["restarts"], os.getpid(), file=sys.stderr, flush=True)
"""
BEATING = "while True: beat(); time.sleep(0.1)"


@pytest.fixture
def run() -> "Iterator[list[subprocess.Popen[str]]]":
    children: list[subprocess.Popen[str]] = []
    yield children
    for child in children:
        child.kill()
        child.wait()


def start(
    run: "list[subprocess.Popen[str]]", engine: str, startup_timeout: float = 60, drain_timeout: float = 5
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SERVE, ENGINE + engine, str(startup_timeout), str(drain_timeout)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.append(child)
    return child


def next_engine(child: "subprocess.Popen[str]") -> tuple[int, int]:
    """Number and PID of the next engine process that starts."""
    assert child.stderr is not None
    for line in child.stderr:
        if not line.startswith("{"):
            number, pid = line.split()
            return int(number), int(pid)
    raise AssertionError("it ended")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_signal_drains(run: "list[subprocess.Popen[str]]", number: int) -> None:
    engine = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n" + BEATING
    child = start(run, engine)
    assert child.stdout is not None and child.stdout.readline().startswith("ready")
    _, pid = next_engine(child)
    child.send_signal(number)
    assert child.wait(30) == 0
    assert not Path(f"/proc/{pid}").exists()


def test_an_engine_that_does_not_end_is_killed(run: "list[subprocess.Popen[str]]") -> None:
    child = start(run, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + BEATING, drain_timeout=0)
    assert child.stdout is not None and child.stdout.readline().startswith("ready")
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 0
    assert child.stderr is not None and "s after --drain: it is killed" in child.stderr.read()


def test_an_engine_that_dies_or_hangs_is_replaced(run: "list[subprocess.Popen[str]]") -> None:
    child = start(run, BEATING)
    for number, kill in enumerate((signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)):
        restarts, pid = next_engine(child)
        assert restarts == number
        time.sleep(0.5)
        os.kill(pid, kill)
    assert next_engine(child)[0] == 3


def test_an_engine_that_is_wrongly_set_up_ends_the_server(run: "list[subprocess.Popen[str]]") -> None:
    child = start(run, "sys.exit('no bundle')")
    assert child.wait(30) == 1
    assert child.stderr is not None and "see the error above" in child.stderr.read()


def test_a_first_start_that_is_killed_is_tried_again(run: "list[subprocess.Popen[str]]") -> None:
    """A bundle may have taken all memory; the next engine leaves it out."""
    child = start(run, "options['restarts'] or os.kill(os.getpid(), 9)\n" + BEATING)
    assert child.stdout is not None and child.stdout.readline().startswith("ready")


def test_a_start_that_takes_too_long_is_named(run: "list[subprocess.Popen[str]]") -> None:
    child = start(run, "time.sleep(60)", startup_timeout=0.2)
    assert child.wait(30) == 1
    assert child.stderr is not None
    lines = [json.loads(line) for line in child.stderr.read().splitlines() if line.startswith("{")]
    assert "was not ready within 0.2 s" in lines[0]["message"]


def test_it_is_light() -> None:
    """It stays beside every engine process, and starts the next one."""
    program = "import sys, handlers.asgi.supervisor; print(sorted({'torch', 'timm', 'fastapi'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_address_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ServerError, match="choose another"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_urls() -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert Supervisor(listening, AsgiSettings()).url == f"http://127.0.0.1:{port}"


def test_the_engine_runs_our_module() -> None:
    assert supervisor.process is process
    assert process.python("handlers.asgi.worker")[1:3] == ["-P", "-m"]
