"""An HTTP server for /metrics that idle, slow or many connections can't exhaust."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cascade.errors import CascadeError

CONNECTIONS = 32
"""Simultaneous connections; more are closed at once. Each takes a thread and a file descriptor."""
LIFETIME = 10.0
"""Seconds after which a connection is closed, whatever it is doing."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Server(ThreadingHTTPServer):
    """Answers GET /metrics and nothing else.

    Args:
        scrape: returns the body.
        allowed: whether an Authorization header ("" if there is none) may read the metrics; None lets everybody.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(
        self, address: tuple[str, int], scrape: Callable[[], bytes], allowed: Callable[[str], bool] | None
    ) -> None:
        self.scrape, self.allowed = scrape, allowed
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the connection, unless there are too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer the request, and close the connection when its lifetime ends at the latest."""
        end = threading.Timer(LIFETIME, _cut, [request])
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore broken connections: the default prints a traceback."""


class Handler(BaseHTTPRequestHandler):
    """One request per connection (HTTP/1.0)."""

    server: Server
    timeout = LIFETIME

    def do_GET(self) -> None:
        """Answer with the metrics, or with 401 or 404."""
        if self.path.partition("?")[0] not in ("/metrics", "/"):
            return self._answer(404, b"only /metrics\n")
        if self.server.allowed is not None and not self.server.allowed(self.headers.get("Authorization", "")):
            return self._answer(401, b"metrics need the token: Authorization: Bearer TOKEN\n")
        return self._answer(200, self.server.scrape(), CONTENT_TYPE)

    def _answer(self, status: int, body: bytes, content_type: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        """The Server header, without versions."""
        return "cascade"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: stderr holds JSON lines only."""


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serve(
    scrape: Callable[[], bytes], host: str, port: int, allowed: Callable[[str], bool] | None = None
) -> Iterator[str]:
    """Serve /metrics until the block ends; yields the URL. Port 0 takes a free one.

    Raises:
        CascadeError: the address is taken, or not one of this machine.
    """
    try:
        server = Server((host, port), scrape, allowed)
    except OSError as error:
        raise CascadeError(
            f"metrics cannot be served on {host}:{port} ({error.strerror}): choose another port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="metrics", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
