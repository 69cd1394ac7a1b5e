"""Keep the listening socket, and an engine process behind it: when that dies, the next one takes over the socket.

Clients that connect in the meantime wait in the socket's queue instead of being refused.
"""

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from cascade.errors import CascadeError
from cascade.logs import say
from handlers import process

BACKLOG = 1024
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between a death and the next start; doubles while none gets ready
KILL_AFTER = 5.0  # seconds after the time to drain


class ServerError(CascadeError):
    """The server cannot be started."""


class Supervisor:
    """Runs in the main thread until SIGTERM or Ctrl-C.

    Args:
        settings: of the engine process, see ``serve``.
        drain_timeout: seconds for the requests in progress after SIGTERM.
    """

    def __init__(self, listening: socket.socket, settings: dict[str, Any], drain_timeout: float) -> None:
        self.listening, self.settings, self.drain_timeout = listening, settings, drain_timeout
        host, port = listening.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.stopping = False
        self.restarts = 0
        self.worker: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Return after an orderly end. Raises ServerError where the first engine process does not come up."""
        ctypes.CDLL(None).prctl(process.PR_SET_CHILD_SUBREAPER, 1)
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, self._stop)
        pause, was_ready = FIRST_PAUSE, False
        try:
            while not self.stopping:
                worker, ready = self._start()
                if ready and not was_ready:
                    print(
                        f"ready: curl -T IMAGE {self.url}/v1/predict\npage: {self.url}/ui\nmetrics: {self.url}/metrics",
                        flush=True,
                    )
                worker.wait()
                was_ready |= ready
                pause = FIRST_PAUSE if ready else min(2 * pause, LONGEST_PAUSE)
                process.kill(worker)  # whatever it left behind
                if self.stopping:
                    return
                if not was_ready:
                    raise ServerError("the engine process does not start: its reason stands above")
                self.restarts += 1
                say("cascade.supervisor", f"the engine process ended (status {worker.returncode}) and is started again")
                self._sleep(pause)
        finally:
            if self.worker is not None:
                process.kill(self.worker)

    def _start(self) -> tuple["subprocess.Popen[bytes]", bool]:
        """A new engine process, and whether it is ready (or else on its way out)."""
        reading, writing = os.pipe()
        fds = (self.listening.fileno(), writing)
        settings = self.settings | {"socket": fds[0], "ready": writing, "drain_timeout": self.drain_timeout}
        settings["restarts"] = self.restarts
        launcher = [sys.executable, "-I", "-S", "-c", process.LAUNCHER, str(os.getpid())]
        command = [*launcher, sys.executable, "-m", "handlers.asgi.worker", json.dumps(settings)]
        with os.fdopen(reading, "rb") as pipe:
            try:
                self.worker = subprocess.Popen(
                    command, env=_environment(), stdin=subprocess.DEVNULL, pass_fds=fds, start_new_session=True
                )
            finally:
                os.close(writing)
            if self.stopping:  # the signal came before there was anybody to pass it on to
                self.worker.terminate()
            return self.worker, pipe.readline() != b""

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Pass it on; the worker gets its time to drain, then it is killed."""
        if not self.stopping:
            self.stopping = True
            signal.signal(signal.SIGALRM, self._kill)
            signal.setitimer(signal.ITIMER_REAL, self.drain_timeout + KILL_AFTER)
        if self.worker is not None:
            self.worker.terminate()

    def _kill(self, number: int, frame: FrameType | None) -> None:
        if self.worker is not None:
            self.worker.kill()

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < end:
            select.select([], [], [], 0.05)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ServerError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as e:
        raise ServerError(f"cannot listen on {host}:{port} ({e}): choose another address or port") from e


def serve(
    model_store: Path | str,
    host: str = "127.0.0.1",
    port: int = 8080,
    budget_bytes: int | None = None,
    memory_bytes: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    max_batch: int = 32,
    patience: float = 0.05,
    queue: int = 256,
    connections: int = 4096,
    api_keys: Path | None = None,
    index: Path | None = None,
    pins: Mapping[str, str] | None = None,
    poll: float = 10,
    drain_timeout: float = 8,
    log_level: str = "info",
) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C, then return.

    Args:
        model_store: a folder, or a URL that fsspec knows.
        budget_bytes: of materialized masks. memory_bytes: of backbones and bundles; None for no limit.
        threads: of torch; None for one a core.
        max_batch, patience, queue: of the batcher.
        connections: at a time; more get 503.
        api_keys: a file as ``handlers.asgi.keys.read`` takes it; None lets everybody in.
        index: a folder that ``cascade index build`` made, for /v1/search.
        pins: version by bundle name, for requests that name none.
        poll: seconds between two looks at the store; 0 for never.
        drain_timeout: seconds for the requests in progress to finish.
        log_level: debug shows the polled paths, too; warning only what is wrong.

    Raises:
        ServerError: the address cannot be had, or the engine process does not come up.
    """
    settings = {
        "model_store": str(model_store),
        "budget_bytes": budget_bytes,
        "memory_bytes": memory_bytes,
        "pins": dict(pins or {}),
        "poll": poll,
        "device": device,
        "threads": threads or len(os.sched_getaffinity(0)),
        "max_batch": max_batch,
        "patience": patience,
        "queue": queue,
        "connections": connections,
        "api_keys": None if api_keys is None else str(api_keys.resolve()),
        "index": None if index is None else str(index.resolve()),
        "log_level": log_level,
    }
    with listen(host, port) as listening:
        Supervisor(listening, settings, drain_timeout).run()


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    # Threads that wait by spinning cost 1 s an image where a core is taken by somebody else.
    return os.environ | {"PYTHONPATH": search, "OMP_WAIT_POLICY": "passive"}
