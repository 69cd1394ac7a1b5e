"""The watchdog: keeps the listening socket and an engine process behind it; if that dies or hangs, another takes over.

Clients that connect in the meantime wait in the socket's backlog instead of being refused.
"""

import json
import os
import select
import signal
import socket
import subprocess
import time
from dataclasses import replace
from types import FrameType

from cascade.cpus import cpu_count
from cascade.errors import CascadeError
from cascade.logs import say
from handlers import process
from handlers.settings import AsgiSettings
from handlers.signals import on_stop

BACKLOG = 1024
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between a death and the next start; doubled until one becomes ready
FIRST_STARTS = 5  # attempts until the first engine process becomes ready
KILL_AFTER = 5.0  # seconds after the drain timeout; an engine process needs one or two to close
JOURNAL_BYTES = 2**16
HEARTBEAT_TIMEOUT = 30.0
"""Seconds without a heartbeat after which an engine process counts as hung; it sends one a second."""


class ServerError(CascadeError):
    """The server cannot be started."""


class Supervisor:
    """Runs in the main thread until SIGTERM, SIGINT or SIGHUP."""

    def __init__(self, listening: socket.socket, settings: AsgiSettings) -> None:
        self.listening, self.settings = listening, settings
        host, port = listening.getsockname()[:2]
        scheme = "http" if settings.tls_cert is None else "https"
        self.url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        self.stopping = False
        self.starts = 0
        self.was_ready = False
        self.worker: subprocess.Popen[bytes] | None = None
        self.journal = os.memfd_create("cascade-journal")  # see cascade.engine.journal
        os.ftruncate(self.journal, JOURNAL_BYTES)  # now, while memory is available

    def run(self) -> None:
        """Return after an orderly shutdown. Raises ServerError if the first engine process does not become ready."""
        on_stop(self._stop)
        pause = FIRST_PAUSE
        try:
            while not self.stopping:
                worker, pipe = self._start()
                with os.fdopen(pipe, "rb") as heartbeat:
                    ready = self._follow(worker, heartbeat.fileno())
                process.kill(worker)  # and its descendants
                if self.stopping:
                    return
                if not self.was_ready:
                    self._check_first_start(worker.returncode)
                pause = FIRST_PAUSE if ready else min(2 * pause, LONGEST_PAUSE)
                say("cascade.supervisor", f"the engine process ended (status {worker.returncode}) and is started again")
                self._sleep(pause)
        finally:
            if self.worker is not None:
                process.kill(self.worker)
            os.close(self.journal)

    def _start(self) -> tuple["subprocess.Popen[bytes]", int]:
        """Start an engine process; return it and the reading end of its heartbeat pipe."""
        reading, writing = os.pipe()
        inherited = {"socket": self.listening.fileno(), "heartbeat": writing, "journal": self.journal}
        settings = self.settings.options() | inherited | {"restarts": self.starts}
        command = process.python("handlers.asgi.worker", json.dumps(settings, default=_plain))
        self.starts += 1
        try:
            self.worker = process.start(
                command, process.environment(self.settings.threads), pass_fds=inherited.values()
            )
        finally:
            os.close(writing)
        if self.stopping:  # the signal came before there was a process to pass it on to
            self.worker.terminate()
        return self.worker, reading

    def _follow(self, worker: "subprocess.Popen[bytes]", heartbeat: int) -> bool:
        """Watch the heartbeat until the process ends, and kill it if it hangs. Returns whether it became ready."""
        ready, timeout = False, self.settings.startup_timeout
        while select.select([heartbeat], [], [], timeout)[0]:
            if not os.read(heartbeat, 4096):  # closed: it has ended
                break
            if not self.was_ready:
                print(
                    f"ready: curl -T IMAGE {self.url}/v1/predict\npage: {self.url}/ui\nmetrics: {self.url}/metrics",
                    flush=True,
                )
            ready = self.was_ready = True
            timeout = HEARTBEAT_TIMEOUT
        else:
            if not self.stopping:
                what = f"sent no heartbeat for {timeout:g} s" if ready else f"was not ready within {timeout:g} s"
                say("cascade.supervisor", f"the engine process {what}: it is killed")
                worker.kill()
        worker.wait()
        return ready

    def _check_first_start(self, status: int) -> None:
        """Raise ServerError unless a retry may help: a process that was killed may have loaded a bad bundle."""
        if status >= 0 or self.starts >= FIRST_STARTS:
            raise ServerError(f"the engine process does not start (status {status}): see the error above")

    def _stop(self) -> None:
        """Forward the signal; the worker may drain until the timeout, then it is killed."""
        if not self.stopping:
            self.stopping = True
            signal.signal(signal.SIGALRM, self._kill)
            signal.setitimer(signal.ITIMER_REAL, self.settings.drain_timeout + KILL_AFTER)
        if self.worker is not None:
            self.worker.terminate()

    def _kill(self, number: int, frame: FrameType | None) -> None:
        if self.worker is not None:
            self.worker.kill()
            say("cascade.supervisor", f"the engine process did not end {KILL_AFTER:g} s after --drain: it is killed")

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < end:
            select.select([], [], [], 0.05)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple | frozenset) else str(value)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises ServerError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as e:
        raise ServerError(f"cannot listen on {host}:{port} ({e}): choose another address or port") from e


def serve(settings: AsgiSettings) -> None:
    """Serve in the foreground until SIGTERM, SIGINT or SIGHUP; drain, then return.

    Raises:
        ServerError: the address is taken, or the engine process does not become ready.
    """
    settings = replace(settings, threads=settings.threads or cpu_count())
    with listen(settings.host, settings.port) as listening:
        Supervisor(listening, settings).run()
