"""TLS: the certificate of the server, and its handshakes with clients."""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Never

import uvicorn

from cascade.errors import CascadeError
from handlers.asgi.watched import Watched

log = logging.getLogger("cascade.tls")
SECONDS = 10.0
"""For a handshake, and for the client to confirm that a connection is closed."""
PAUSE = 1.0  # seconds until the next connection is accepted, after one could not be


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key.

    Attributes:
        context: for HTTP; TLS 1.2 or newer.
        chain, key: the files, for gRPC.
    """

    context: ssl.SSLContext
    chain: bytes
    key: bytes = field(repr=False)


def read(cert: Path, key: Path) -> Certificate:
    """Read a certificate chain and its private key, both PEM.

    Raises:
        CascadeError: they cannot be read, do not belong together, or the key is encrypted.
    """

    def encrypted() -> Never:
        raise CascadeError(f"the key in {key} is encrypted: decrypt it with openssl pkey, and keep its mode 0600")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, encrypted)
        return Certificate(context, cert.read_bytes(), key.read_bytes())
    except OSError as error:  # that of OpenSSL is one, too
        why = error.strerror or error
        raise CascadeError(f"no TLS with {cert} and {key} ({why}): pass a PEM certificate and its key") from error


@asynccontextmanager
async def accepting(
    server: uvicorn.Server, listening: socket.socket, certificate: Watched[Certificate], most: int
) -> AsyncIterator[None]:
    """Accept connections of a started server until the block ends.

    A TLS server of asyncio's tells its protocol of a connection only after the handshake. Then connections that never
    finish it could not be counted, and would use up all file descriptors.

    Args:
        most: connections at the same time, with those in their handshake; more are closed.
    """
    loop, config = asyncio.get_running_loop(), server.config
    make = partial(config.http_protocol_class, config, server.server_state, server.lifespan.state)  # type: ignore[call-arg]
    handshakes: set[asyncio.Task[None]] = set()

    async def shake_hands(connection: socket.socket) -> None:
        with suppress(OSError):  # no TLS, none that we speak, too slow, or closed by the client
            await loop.connect_accepted_socket(
                make,
                connection,
                ssl=certificate.value.context,
                ssl_handshake_timeout=SECONDS,
                ssl_shutdown_timeout=SECONDS,
            )

    async def accept() -> None:
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:  # closed by the client already, or no file descriptor is left
                log.warning("a connection can't be accepted: %s", error.strerror)
                await asyncio.sleep(PAUSE)
                continue
            if len(handshakes) + len(server.server_state.connections) >= most:
                connection.close()
                continue
            task = loop.create_task(shake_hands(connection))
            handshakes.add(task)
            task.add_done_callback(handshakes.discard)

    listening.setblocking(False)
    accepts = loop.create_task(accept())
    try:
        yield
    finally:
        for task in (accepts, *handshakes):
            task.cancel()
        await asyncio.gather(accepts, *handshakes, return_exceptions=True)
