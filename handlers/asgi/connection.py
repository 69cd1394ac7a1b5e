"""What uvicorn leaves open before a request reaches the application: heads without end, in length and in time."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from handlers.asgi.middleware import Message, Receive, Send

MAX_HEAD = 16 * 2**10  # bytes of the request line and all headers
HEAD_SECONDS = 10.0  # from a connection, or a head's first byte, to the head's end


class Connection(HttpToolsProtocol):
    """uvicorn's protocol; refuses long heads with 431, slow ones with 408, and connections beyond ``most`` with 503."""

    def __init__(self, *args: Any, most: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = most

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._head = 0  # bytes of one that is not complete yet
        self._clock: asyncio.TimerHandle | None = None  # runs while a head is awaited
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > self._most:
            self._refuse(503, "overloaded", "too many connections: try again later")
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._clock is not None and not self.transport.is_closing():
            self._head += len(data)
            if self._head > MAX_HEAD:
                self._refuse(*TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0
        self._start_clock()

    def on_headers_complete(self) -> None:
        self._stop_clock()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        self.app = _too_large if size > MAX_HEAD else self.config.loaded_app
        super().on_headers_complete()

    def _start_clock(self) -> None:
        if self._clock is None and not self.transport.is_closing():
            self._clock = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        self._clock = None
        self._refuse(408, "slow_head", f"the headers took over {HEAD_SECONDS:g} s: send them at once")

    def _refuse(self, status: int, kind: str, message: str) -> None:
        """Answer and close; only close where an earlier answer is still being written (pipelined requests)."""
        if self.cycle is None or self.cycle.response_complete:
            headers, body = _answer(status, kind, message)
            lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())]
            lines += [name + b": " + value for name, value in headers]
            self.transport.write(b"\r\n".join([*lines, b"", body]))
        self.transport.close()


TOO_LARGE = (431, "head_too_large", f"the headers are over {MAX_HEAD} bytes: send fewer")


async def _too_large(scope: Message, receive: Receive, send: Send) -> None:
    headers, body = _answer(*TOO_LARGE)
    await send({"type": "http.response.start", "status": TOO_LARGE[0], "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _answer(status: int, kind: str, message: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    error = {"error": {"status": status, "kind": kind, "message": message}}
    body = json.dumps(error, separators=(",", ":")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    again = [(b"retry-after", b"1")] if status == 503 else []
    return [*headers, *again, (b"connection", b"close")], body
