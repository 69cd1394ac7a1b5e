"""Start TorchServe over a model store, supervise it, and leave no process and no file behind.

All files of TorchServe (configuration, logs, sockets, the model folder, metrics) are in one private temporary folder.
Its Java process is started directly, because TorchServe's own launcher orphans it on SIGTERM.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from string import Template
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import httpx
from rich.console import Console

from cascade import metrics
from cascade.bundle.location import is_url
from cascade.cpus import cpu_count
from cascade.errors import CascadeError
from cascade.logs import say
from cascade.model.decoding import LIMITS
from handlers import process
from handlers.signals import deferred, exit_on_signals
from handlers.torchserve import failures, java, tokens
from handlers.torchserve.tokens import TokenError

HERE = Path(__file__).parent
LOOPBACK = "127.0.0.1"
PORTS = ("port", "metrics_port", "management_port", "grpc_inference_port", "grpc_management_port")
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
LOG_LEVELS = ("debug", "info", "warning", "error")
POLL = 10.0  # seconds between two checks of the store
GIVEN_UP = 15.0  # seconds after `start_timeout` in which TorchServe may still retry
LOGGED = 1.0  # seconds until Java has written the last lines of a dead worker


class ServerError(CascadeError):
    """TorchServe cannot be started, or it stopped by itself."""


class Server:
    """A running TorchServe: `with Server(store) as server: httpx.post(server.url, content=jpeg)`.

    Enter it in the main thread. Entering returns when every worker is READY. Leaving drains the requests in progress,
    then ends every process and removes every file. Raises ServerError.

    Args:
        model_store: contains <name>/<version>/cascade.json; a folder, or a URL for fsspec.
        host: address of predictions and metrics; management and gRPC are always on loopback.
        port, metrics_port, management_port: 0 for any free one.
        workers: each has its own backbone.
        budget_bytes: of materialized masks, per worker; None for the engine's default.
        threads: of torch, per worker; None divides the cores among the workers.
        start_timeout: seconds until every worker is READY.
        drain_timeout: seconds for the work in progress to finish.
        log_to_stderr: write the warnings of the running server there.
        auth: predictions and metrics need a token.
        token_file: where the token is written (mode 0600) while the server runs; None for the private folder.
        pins: version by bundle name, for requests without a version.
        poll: seconds between two checks of the store; 0 for never.
        memory_bytes: of backbones and packed bundles, per worker; None for no limit.
        on_demand: load a bundle when it is first requested.
        keep_unknown: a folder in which images that fit no bundle are kept; None: they are not kept.
        keep_images, keep_bytes: most of them.
        log_level: of the workers; info has a line per request.

    Attributes:
        url: where images are posted.
        metrics_url: Prometheus metrics of all workers; management_url: the state of the workers, on loopback.
        java: the parent process of the workers.
        folder: holds every file that the server writes; private.
        wants_new_tokens: set it to make `wait` renew the tokens within about a second.
    """

    def __init__(
        self,
        model_store: Path | str,
        host: str = LOOPBACK,
        port: int = 0,
        metrics_port: int = 0,
        management_port: int = 0,
        workers: int = 1,
        budget_bytes: int | None = None,
        device: str = "cpu",
        threads: int | None = None,
        start_timeout: float = 300,
        drain_timeout: float = 8,
        log_to_stderr: bool = False,
        auth: bool = True,
        token_file: Path | None = None,
        pins: Mapping[str, str] | None = None,
        poll: float = POLL,
        memory_bytes: int | None = None,
        log_level: str = "warning",
        on_demand: bool = False,
        keep_unknown: Path | None = None,
        keep_images: int = 2000,
        keep_bytes: int = 2**28,
    ) -> None:
        if log_level not in LOG_LEVELS:
            raise ServerError(f"unknown log level {log_level!r}: choose one of {', '.join(LOG_LEVELS)}")
        remote = is_url(str(model_store))
        if not remote and not any(Path(model_store).glob("*/*/cascade.json")):
            raise ServerError(f"no bundle in {model_store}: it has to hold <name>/<version>/cascade.json")
        inside = [(LOOPBACK, number) for number in (management_port, 0, 0)]
        self.threads = threads or max(1, cpu_count() // workers)
        ports = claim_ports((host, port), (host, metrics_port), *inside)
        self.settings = dict(zip(PORTS, ports, strict=True)) | {
            "host": host,
            "model_store": json.dumps(str(model_store if remote else Path(model_store).resolve())),
            "workers": workers,
            "budget_bytes": json.dumps(budget_bytes),
            "memory_bytes": json.dumps(memory_bytes),
            "pins": json.dumps(dict(pins or {})),
            "poll": poll,
            "on_demand": json.dumps(on_demand),
            "keep_unknown": json.dumps(keep_unknown and str(keep_unknown.resolve())),
            "keep_images": keep_images,
            "keep_bytes": keep_bytes,
            "log_level": log_level,
            "device": device,
            "threads": self.threads,
            "no_auth": "false" if auth else "true",
            "startup_timeout": round(start_timeout),
            "max_request_size": LIMITS.max_bytes * 4 // 3 + 2**16,  # base64, and the JSON around it
        }
        self.workers, self.log_to_stderr = workers, log_to_stderr
        self.auth, self._token_file = auth, token_file
        self.wants_new_tokens = False
        self.start_timeout, self.drain_timeout = start_timeout, drain_timeout
        self.url = f"http://{host}:{ports[0]}/predictions/cascade"
        self.metrics_port = ports[1]
        self.metrics_url = f"http://{host}:{ports[1]}/metrics"
        self.management_url = f"http://{LOOPBACK}:{ports[2]}/models/cascade"

    def __enter__(self) -> Server:
        with ExitStack() as stack:
            # Ignore the environment's proxy, since this is loopback.
            self.client = stack.enter_context(httpx.Client(trust_env=False))
            self.folder = Path(stack.enter_context(TemporaryDirectory(prefix="cascade-")))  # mode 0700
            self.token_file = self._token_file or self.folder / "token"
            self._fill_folder()
            os.environ[METRICS_FOLDER] = str(self.folder / "metrics")  # the workers inherit it
            stack.callback(os.environ.pop, METRICS_FOLDER)
            self.failures = failures.Failures(self.folder / "failures")
            stack.callback(self.failures.close)
            allowed = self._may_read_metrics if self.auth else None
            stack.enter_context(metrics.serve(str(self.settings["host"]), self.metrics_port, allowed))
            environment = java.environment(self.folder, self.threads)
            with self.folder.joinpath("java.log").open("wb") as log:
                errors = sys.stderr.buffer if self.log_to_stderr else log
                with deferred():
                    self.java = process.start(java.command(self.folder), environment, self.folder, log, errors)
                    # SIGTERM would not help: Java drops its connections, then waits for seconds.
                    stack.callback(process.kill, self.java)
            self._wait_until_ready()
            if self.auth:
                stack.callback(self.token_file.unlink, missing_ok=True)
                tokens.hand_out(self.folder, self.token_file)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._resources:
            if self.java.poll() is None:
                self._drain()

    def wait(self) -> NoReturn:
        """Never return; raise ServerError when the server has ended, or no worker was ready for too long.

        TorchServe restarts a dead worker for `start_timeout` seconds, then gives up but keeps running.
        """
        ready = time.monotonic()
        reason = None
        while self.java.poll() is None:
            time.sleep(1)
            if self.wants_new_tokens:
                self.wants_new_tokens = False
                try:
                    self.renew_tokens()
                except TokenError as e:
                    say("cascade.torchserve", str(e))
            for reason in self.failures.read():
                say("cascade.torchserve", f"a worker does not start; TorchServe tries again: {reason}")
            now = time.monotonic()
            if any(worker["status"] == "READY" for worker in self._describe()):
                ready, reason = now, None
            elif now > ready + self.start_timeout + GIVEN_UP:
                why = reason or self._tail("worker.log", 40)
                raise ServerError(f"no worker came back within {now - ready:.0f} s: {why}")
        why = f"exit status {self.java.returncode}, {self._tail('java.log')}"
        raise ServerError(f"TorchServe ended by itself: {why}")

    def _fill_folder(self) -> None:
        """Write the configuration, the model folder for TorchServe, and an empty folder for metrics."""
        if len(str(self.folder)) > 80:  # it holds sockets, whose paths are limited to 107 bytes
            raise ServerError(
                f"the path of the temporary folder {self.folder} is too long: set TMPDIR to a shorter one"
            )
        model = self.folder / "models" / "cascade"
        model.joinpath("MAR-INF").mkdir(parents=True)
        shutil.copy(HERE / "MANIFEST.json", model / "MAR-INF")
        for folder, name in ((self.folder, "config.properties"), (model, "model-config.yaml")):
            template = Template(HERE.joinpath(name).read_text())
            folder.joinpath(name).write_text(template.substitute(self.settings, folder=self.folder))
        self.folder.joinpath("gate").touch()
        metrics.prepare_folder(self.folder / "metrics")

    @property
    def headers(self) -> dict[str, str]:
        """The header with the token that predictions and metrics need; empty without authorization."""
        return self._bearer("inference")

    def renew_tokens(self) -> None:
        """Renew the tokens, also in the file; the old ones become invalid. Raises TokenError."""
        if self.auth:
            tokens.renew(self.folder, self.management_url, self.client)
            tokens.hand_out(self.folder, self.token_file)

    def _bearer(self, kind: tokens.Kind) -> dict[str, str]:
        return tokens.bearer(self.folder, kind) if self.auth else {}

    def _may_read_metrics(self, header: str) -> bool:
        try:
            return hmac.compare_digest(header.encode(), self.headers["Authorization"].encode())
        except (OSError, ValueError):  # the keys are not written yet
            return False

    def _describe(self) -> list[dict[str, Any]]:
        """TorchServe's description of its workers; empty while it does not answer."""
        try:
            headers = self._bearer("management")
            return list(self.client.get(self.management_url, headers=headers).raise_for_status().json()[0]["workers"])
        except (httpx.HTTPError, OSError, ValueError):  # not up yet, or the keys are still being written
            return []

    def _wait_until_ready(self) -> None:
        """Wait for the workers' own state: /ping says Healthy long before, even while a worker crashes in a loop."""
        end = time.monotonic() + self.start_timeout
        seen: set[int] = set()
        while sum(worker["status"] == "READY" for worker in self._describe()) < self.workers:
            if self.java.poll() is not None:
                raise ServerError(f"TorchServe does not start: {self._tail('java.log')}")
            alive = failures.workers(self.java.pid)
            if seen - alive:
                raise ServerError(f"the worker does not start: {self._why_it_died()}")
            seen |= alive
            if time.monotonic() > end:
                limit = f"not ready within {self.start_timeout:g} s (--startup-timeout)"
                raise ServerError(f"{limit}: {self._tail('worker.log')}")
            time.sleep(0.1)

    def _drain(self) -> None:
        """Drain: refuse new work with 503 and wait for the answers in progress, at most `drain_timeout`.

        The queue is FIFO: once our own request is answered, all requests before it have reached a worker. A worker
        holds a shared lock on the gate file while it works, and refuses work once the file is gone.
        """
        end = time.monotonic() + self.drain_timeout
        self._pass_through(end)
        with self.folder.joinpath("gate").open() as gate:
            self.folder.joinpath("gate").unlink()
            while time.monotonic() < end:
                try:
                    fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.01)
        self._pass_through(end)  # afterwards the last answers have been written, too

    def _pass_through(self, end: float) -> None:
        """Send a request that the handler refuses at once, and wait for the refusal."""
        left = max(0.5, end - time.monotonic())
        try:
            self.client.post(self.url, headers=self.headers | {"X-Cascade-Fields": "nothing"}, timeout=left)
        except httpx.HTTPError as e:
            print(f"not all requests could be finished before the end: {e!r}", file=sys.stderr)

    def _why_it_died(self) -> str:
        """The reason that the handler sent before the worker ended, or else the log's last lines."""
        if reasons := self.failures.read():
            return reasons[-1]
        time.sleep(LOGGED)
        return self._tail("worker.log", 40)

    def _log(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""

    def _tail(self, name: str, lines: int = 15) -> str:
        tail = self._log(name).strip().splitlines()[-lines:]
        return "\n  ".join(["its last lines:", *tail]) if tail else "it wrote nothing"


def claim_ports(*addresses: tuple[str, int]) -> list[int]:
    """Return the ports of the addresses, checked to be free; a free one instead of 0. Raises ServerError."""
    with ExitStack() as sockets:  # all at once, so that no two are the same
        claimed = []
        for address in addresses:
            claim = sockets.enter_context(socket.socket())
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                claim.bind(address)
            except (OSError, OverflowError) as e:
                where = "{}:{}".format(*address)
                raise ServerError(f"cannot listen on {where} ({e}): choose another address or port") from e
            claimed.append(claim.getsockname()[1])
    return claimed


def serve(
    model_store: Path | str,
    port: int = 8080,
    metrics_port: int = 8082,
    management_port: int = 8081,
    **options: Any,
) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C; SIGUSR1 renews the tokens. Arguments as in `Server`.

    Raises:
        ServerError: it cannot be started, or it ended by itself.
    """
    options |= {"port": port, "metrics_port": metrics_port, "management_port": management_port}
    server = Server(model_store, log_to_stderr=True, **options)
    exit_on_signals()
    signal.signal(signal.SIGUSR1, lambda *_: setattr(server, "wants_new_tokens", True))
    console = Console(soft_wrap=True, highlight=False)
    with ExitStack() as stack:
        with console.status("starting TorchServe"):
            stack.enter_context(server)
        token = f'-H "Authorization: Bearer $(cat {quote(str(server.token_file))})" ' if server.auth else ""
        console.print(f"ready: curl -T IMAGE {token}{server.url}\nmetrics: {server.metrics_url}\nCtrl-C stops")
        server.wait()
