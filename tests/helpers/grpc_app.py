"""The gRPC server over an application in this process."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from handlers.asgi import grpc_server
from handlers.asgi.middleware import Guard
from handlers.asgi.tls import Certificate
from handlers.asgi.watched import Watched
from tests.helpers.asgi_app import LIMITS


@contextmanager
def serving(guard: Guard, port: int = 0, certificate: Watched[Certificate] | None = None) -> Iterator[str]:
    """Serve in a thread with a loop of its own; yields the address."""
    ports: list[int] = []
    started, loop = threading.Event(), asyncio.new_event_loop()
    end = asyncio.Event()

    async def serve() -> None:
        async with grpc_server.serving(guard, "127.0.0.1", port, LIMITS, 1, certificate) as bound:
            ports.append(bound)
            started.set()
            await end.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(30)
    try:
        yield f"127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(30)
        loop.close()
