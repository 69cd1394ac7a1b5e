"""The engine process: loads the model store, then serves on an inherited socket until it is told to stop.

python -m handlers.asgi.worker '{"socket": 3, ...}'     as handlers/asgi/supervisor.py starts it
"""

import asyncio
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from cascade import tracing
from cascade.cpus import cpu_count
from cascade.engine.batcher import PASS_TIMEOUT, Batcher
from cascade.engine.engine import Engine
from cascade.engine.journal import Journal
from cascade.engine.stores import load_store
from cascade.errors import CascadeError
from cascade.garbage import exempt_loaded
from cascade.logs import log_to_stderr
from cascade.malloc_trim import Heap
from cascade.offline.index.live import LiveIndex
from handlers.asgi import key_file, tls
from handlers.asgi.app import create_app
from handlers.asgi.connection import Connection
from handlers.asgi.keys import Keys
from handlers.asgi.metrics import ENGINE_RESTARTS
from handlers.asgi.middleware import Guard
from handlers.asgi.service import Service
from handlers.asgi.watched import Watched
from handlers.settings import AsgiSettings

TICKS = 10  # of uvicorn, per second
GRACE = 1.0  # seconds for gRPC calls at the end, when all should have been answered
SPARE_FILES = 32  # descriptors for everything besides connections: loading bundles, reading keys, metrics
log = logging.getLogger("cascade.worker")


class Server(uvicorn.Server):
    """uvicorn with a different shutdown: it drains while it still accepts connections and refuses new work.

    Args:
        heartbeat: descriptor of a pipe that gets one byte per second, the first one when the server is ready.
        grpc: context manager that serves gRPC while its block runs.
        certificate: for TLS; None for plain HTTP. most: connections at the same time, with TLS.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        guard: Guard,
        drain_timeout: float,
        heartbeat: int,
        keys: Watched[Keys] | None = None,
        grpc: AbstractAsyncContextManager[int] | None = None,
        certificate: Watched[tls.Certificate] | None = None,
        most: int = 0,
    ) -> None:
        super().__init__(config)
        self.grpc, self.stack = grpc, AsyncExitStack()
        self.service, self.guard, self.keys = service, guard, keys
        self.certificate, self.most = certificate, most
        self.drain_timeout, self.heartbeat = drain_timeout, heartbeat
        self.end = float("inf")
        self.memory = Heap()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.service.stopping:
            self.service.stopping = True
            self.end = time.monotonic() + self.drain_timeout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets if self.certificate is None else [])
        if self.certificate is not None:
            for listening in sockets or ():
                accepting = tls.accepting(self, listening, self.certificate, self.most)
                await self.stack.enter_async_context(accepting)
        if self.grpc is not None:
            await self.stack.enter_async_context(self.grpc)
        self._beat()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.stack.aclose()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        drained = self.service.stopping and (self.guard.requests == 0 or time.monotonic() > self.end)
        dead = not self.service.batcher.alive  # the supervisor then starts another process
        if self.service.batcher.pass_seconds > PASS_TIMEOUT:
            log.error("a pass has been running for %d s: this process ends, and the next one takes over", PASS_TIMEOUT)
            os.kill(os.getpid(), signal.SIGKILL)  # nothing else can end a thread that hangs in a driver
        if counter % TICKS == 0:
            self._beat()
            for connection in [*self.server_state.connections]:
                if isinstance(connection, Connection):
                    connection.check_reader()
            if self.keys is not None:
                self.service.keys = await asyncio.to_thread(self.keys.refresh)
            if self.certificate is not None:
                await asyncio.to_thread(self.certificate.refresh)
        if counter % (2 * TICKS) == 0 and self.guard.requests == 0:
            await asyncio.to_thread(self.memory.give_back)
        return await super().on_tick(counter) or drained or dead

    def _beat(self) -> None:
        with suppress(BlockingIOError):  # full: the supervisor itself is stopped
            os.write(self.heartbeat, b".")


def run(settings: AsgiSettings, listening: socket.socket, heartbeat: int, journal: int, restarts: int) -> None:
    """Serve until SIGTERM or SIGINT. Raises CascadeError."""
    os.set_blocking(heartbeat, False)
    for descriptor in (heartbeat, journal):
        os.set_inheritable(descriptor, False)
    log_to_stderr(settings.log_level)
    threads = settings.threads or cpu_count()
    torch.set_num_threads(threads)
    log.info("%d CPU threads", threads)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    if tracing.start():
        log.info("traces go to the OTLP endpoint of the environment")
    keys = None if settings.api_keys is None else Watched(key_file.read, settings.api_keys)
    certificate = None
    if settings.tls_cert is not None and settings.tls_key is not None:
        certificate = Watched(tls.read, settings.tls_cert, settings.tls_key)
    ENGINE_RESTARTS.inc(restarts)
    index = None if settings.index is None else LiveIndex(settings.index)
    memory, batch = settings.memory_bytes, settings.max_batch
    engine = Engine(settings.budget_bytes, settings.device, memory_bytes=memory, max_batch=batch)
    registry = load_store(
        engine, settings.model_store, settings.pins, journal=Journal(journal), on_demand=settings.on_demand
    )
    with ExitStack() as stack:
        stack.callback(tracing.stop)
        stack.enter_context(listening)
        keeping = engine.keeping_unknown(settings.keep_unknown, settings.keep_images, settings.keep_bytes)
        stack.enter_context(keeping)
        batcher = stack.enter_context(
            Batcher(
                engine,
                max_batch=settings.max_batch,
                patience=settings.patience,
                queue=settings.queue,
                time_slice=settings.time_slice,
                decoders=threads,
            )
        )
        stack.enter_context(registry.watching(settings.poll))
        if index is not None:
            stack.enter_context(index.watching(settings.poll))
        service = Service(batcher, None if keys is None else keys.value, registry=registry)
        guard = create_app(service, index, settings.hosts, registry, settings.cors_origins)
        most = _most_connections(settings.connections, most_files)
        config = uvicorn.Config(
            guard,
            http=partial(Connection, most=most),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]
            timeout_graceful_shutdown=1,
        )
        grpc = None
        if settings.grpc_port is not None:
            from handlers.asgi import grpc_server

            grpc = grpc_server.serving(guard, settings.host, settings.grpc_port, guard.limits, GRACE, certificate)
        exempt_loaded()
        drain = settings.drain_timeout
        Server(config, service, guard, drain, heartbeat, keys, grpc, certificate, most).run([listening])


def _most_connections(wanted: int, most_files: int) -> int:
    """Limit the connections to the available file descriptors."""
    free = most_files - len(os.listdir("/proc/self/fd")) - SPARE_FILES
    if free < wanted:
        log.warning("%d connections at a time: the limit of open files, %d, allows no more", max(1, free), most_files)
    return max(1, min(wanted, free))


def _settings(options: dict[str, Any]) -> AsgiSettings:
    """Parse the settings that the supervisor passes as JSON."""
    options = {f.name: options[f.name] for f in fields(AsgiSettings)}
    for name in ("api_keys", "index", "keep_unknown", "tls_cert", "tls_key"):
        options[name] = options[name] and Path(options[name])
    for name in ("allowed_hosts", "cors_origins"):
        options[name] = tuple(options[name])
    return AsgiSettings(**options)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until uvicorn takes over
    options = json.loads(sys.argv[1])
    try:
        inherited = socket.socket(fileno=options["socket"])
        run(_settings(options), inherited, options["heartbeat"], options["journal"], options["restarts"])
    except CascadeError as error:
        sys.exit(f"error: {error}")
    os._exit(0)  # everything is closed, and tearing down the interpreter takes seconds
