"""Connection limits that uvicorn lacks: for heads, trailers and bodies that never end, and for slow readers."""

import asyncio
import json
import time
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from handlers.asgi.middleware import LIMITS, Message, Receive, Send

MAX_HEAD = 16 * 2**10  # bytes of the request line and all headers, and of all trailers
HEAD_SECONDS = 10.0  # from a connection, or a head's first byte, to the head's end
BODY_SECONDS = LIMITS.body_seconds + 5
"""From the end of the head to the end of the request. If the application reads the body, it answers 408 earlier."""
WRITE_SECONDS = 15.0  # in which a client must read what was sent


class Connection(HttpToolsProtocol):
    """uvicorn's protocol; refuses long heads with 431, slow ones with 408, and connections beyond ``most`` with 503."""

    def __init__(self, *args: Any, most: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = most

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._head = self._trailers = 0  # bytes
        self._in_head, self._in_body = True, False
        self._clock: asyncio.TimerHandle | None = None  # timeout until the head, or the request, is complete
        self._all_read = time.monotonic()  # when the client had last read everything that was sent
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > self._most:
            self._refuse(503, "overloaded", "too many connections: try again later")
        self._start_clock(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self._refuse(*TOO_LARGE)
        elif self._is_idle() and not self._in_body:  # line breaks between requests, which stop the keep-alive timer
            self._start_clock(HEAD_SECONDS)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = self._trailers = 0
        self._in_head, self._in_body = True, False
        self._start_clock(HEAD_SECONDS)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            return super().on_header(name, value)
        self._trailers += len(name) + len(value) + 4  # trailers are ignored, and must never be taken for headers
        if self._trailers > MAX_HEAD and not self.transport.is_closing():
            self._refuse(*TOO_LARGE)

    def on_headers_complete(self) -> None:
        self._stop_clock()
        self._in_head, self._in_body = False, True
        self._start_clock(BODY_SECONDS)
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        self.app = _too_large if size > MAX_HEAD else self.config.loaded_app
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_clock()
        self._in_body = False
        super().on_message_complete()

    def check_reader(self) -> None:
        """Disconnect a client that does not read its answers. Call it about once a second."""
        now = time.monotonic()
        if self.transport.get_write_buffer_size() == 0:
            self._all_read = now
        elif now - self._all_read > WRITE_SECONDS:
            self.transport.abort()  # close() would wait for the client

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_clock(self, seconds: float) -> None:
        if self._clock is None and not self.transport.is_closing():
            self._clock = self.loop.call_later(seconds, self._too_slow)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        self._clock = None
        if self._in_body:  # it was answered without its body, or the answer is on its way
            self.transport.close()
        else:
            self._refuse(408, "slow_head", f"the headers took over {HEAD_SECONDS:g} s: send them at once")

    def _refuse(self, status: int, kind: str, message: str) -> None:
        """Answer and close; only close if an earlier answer is still being written or this request has one already."""
        if self._is_idle() and not self._in_body:
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
    retry = [(b"retry-after", b"1")] if status == 503 else []
    return [*headers, *retry, (b"connection", b"close")], body
