"""The engine process: loads the model store, then serves on the socket that it was given, until it is told to stop.

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
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from cascade.engine.batcher import Batcher
from cascade.engine.engine import Engine
from cascade.engine.registry import load_store
from cascade.errors import CascadeError
from cascade.logs import JsonLines
from cascade.malloc_trim import Resident
from cascade.offline.index import read as read_index
from handlers.asgi.app import create_app
from handlers.asgi.connection import Connection
from handlers.asgi.keys import Watched
from handlers.asgi.metrics import ENGINE_RESTARTS
from handlers.asgi.middleware import Guard
from handlers.asgi.service import Service

READY = b"ready\n"
HUNG = 120  # seconds; a pass takes one or two
log = logging.getLogger("cascade.worker")


class Server(uvicorn.Server):
    """uvicorn, with another end: it goes on accepting, refuses new work, and leaves when the old work is answered."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        guard: Guard,
        settings: dict[str, Any],
        keys: Watched | None = None,
    ) -> None:
        super().__init__(config)
        self.keys = keys
        self.service, self.guard = service, guard
        self.drain_timeout, self.ready = settings["drain_timeout"], settings["ready"]
        self.end = float("inf")
        self.memory = Resident()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.service.stopping:
            self.service.stopping = True
            self.end = time.monotonic() + self.drain_timeout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        os.write(self.ready, READY)
        os.close(self.ready)

    async def on_tick(self, counter: int) -> bool:
        drained = self.service.stopping and (self.guard.requests == 0 or time.monotonic() > self.end)
        dead = not self.service.batcher.alive  # then the supervisor starts another process
        if self.service.batcher.pass_seconds > HUNG:
            log.error("a pass hangs for %d s: this process ends, and the next one takes over", HUNG)
            os.kill(os.getpid(), signal.SIGKILL)  # nothing gentler ends a thread that hangs in a driver
        if self.keys is not None and counter % 10 == 0:  # a second
            self.service.keys = await asyncio.to_thread(self.keys.refresh)
        if counter % 20 == 0 and self.guard.requests == 0:
            await asyncio.to_thread(self.memory.give_back)
        return await super().on_tick(counter) or drained or dead


def run(settings: dict[str, Any]) -> None:
    """Serve until SIGTERM or SIGINT; settings as `supervisor.Server` makes them. Raises CascadeError."""
    _log(settings["log_level"])
    torch.set_num_threads(settings["threads"])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection each
    watched = None if settings["api_keys"] is None else Watched(Path(settings["api_keys"]))
    ENGINE_RESTARTS.inc(settings["restarts"])
    index = None if settings["index"] is None else read_index(Path(settings["index"]))
    engine = Engine(settings["budget_bytes"], settings["device"], memory_bytes=settings["memory_bytes"])
    registry = load_store(engine, settings["model_store"], settings["pins"])
    batching = {name: settings[name] for name in ("max_batch", "patience", "queue")}
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket(fileno=settings["socket"]))
        batcher = stack.enter_context(Batcher(engine, **batching))
        stack.enter_context(registry.watching(settings["poll"]))
        service = Service(batcher, None if watched is None else watched.keys, registry=registry)
        stack.callback(service.close)
        guard = create_app(service, index)
        config = uvicorn.Config(
            guard,
            http=partial(Connection, most=settings["connections"]),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
        )
        Server(config, service, guard, settings, watched).run([listening])


def _log(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("cascade").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of what clients send that is no HTTP


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until uvicorn takes over
    try:
        run(json.loads(sys.argv[1]))
    except CascadeError as error:
        sys.exit(f"error: {error}")
