"""An application that answers at once, served by uvicorn over our connections."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import uvicorn

from handlers.asgi import tls
from handlers.asgi.connection import Connection
from handlers.asgi.watched import Watched

seen: list[dict[bytes, bytes]] = []
"""The headers of each request."""


async def application(scope: Any, receive: Any, send: Any) -> None:
    seen.append(dict(scope["headers"]))
    body = b"x" * 100_000 if scope["path"] == "/large" else scope["scheme"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(
    most: int = 100, keep_alive: float = 60, certificate: Watched[tls.Certificate] | None = None
) -> AsyncIterator[tuple[str, int]]:
    """Serve until the block ends; yields the address."""
    config = uvicorn.Config(
        application,
        http=partial(Connection, most=most),  # type: ignore[arg-type]
        lifespan="off",
        log_config=None,
        timeout_keep_alive=keep_alive,  # type: ignore[arg-type]
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    server.capture_signals = nullcontext  # type: ignore[method-assign,assignment]
    listening = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve([listening] if certificate is None else []))
    while not server.started:
        await asyncio.sleep(0.01)

    async def watch() -> None:
        while True:
            for each in [*server.server_state.connections]:
                assert isinstance(each, Connection)
                each.check_reader()
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    try:
        if certificate is None:
            yield listening.getsockname()
        else:
            async with tls.accepting(server, listening, certificate, most):
                yield listening.getsockname()
            listening.close()
    finally:
        watching.cancel()
        server.should_exit = True
        await task


async def answer(address: tuple[str, int], *parts: bytes) -> bytes:
    """All that comes until the server closes the connection."""
    reader, writer = await asyncio.open_connection(*address)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.2)
    try:
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()
