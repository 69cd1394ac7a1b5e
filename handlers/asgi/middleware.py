"""The outermost layer of the application: Host header, request ids, access log, size and time limits, draining."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from cascade import tracing
from cascade.engine.batcher import STOPPING
from cascade.engine.results import ItemError
from handlers import spans
from handlers.asgi.metrics import HTTP_IN_PROGRESS, HTTP_SECONDS
from handlers.statuses import error_body, status_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

log = logging.getLogger("cascade.http")
ID = re.compile(rb"[\w.:-]{1,128}")
QUIET = ("/v2/health", "/metrics")  # polled every few seconds
FAILED = ItemError("failed", "the server failed at this request: its log says why, under the request id")
UNKNOWN_HOST = ItemError("unknown_host", "no such host here: use localhost, or start with --allowed-host NAME")
DIGITS = 19  # of the largest length in bytes that makes sense


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Attributes:
        body: bytes of one body. bodies: bytes of all bodies in memory.
        body_seconds: to receive a body. answer_seconds: to answer it.
        images: in one request.
    """

    body: int = 64 * 2**20
    bodies: int = 512 * 2**20
    body_seconds: float = 30
    answer_seconds: float = 30
    images: int = 64


LIMITS = Limits()


class Refusal(Exception):
    """Raised to answer a request with an error; the application turns it into a response."""

    def __init__(self, error: ItemError) -> None:
        super().__init__(error.message)
        self.error = error


class Guard:
    """ASGI middleware.

    Attributes:
        requests: in progress, without health checks and scrapes.
        body_bytes: of all bodies in memory.
        hosts: names under which requests are accepted; None for any.
    """

    def __init__(self, app: App, limits: Limits, hosts: Collection[str] | None = None) -> None:
        self.app, self.limits, self.hosts = app, limits, hosts
        self.requests = self.body_bytes = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if scope["path"].startswith(QUIET):
            return await self._answer(scope, headers, receive, send, None)
        with tracing.request(scope["method"], headers) as span:
            await self._answer(scope, headers, receive, send, span)

    async def _answer(
        self,
        scope: MutableMapping[str, Any],
        headers: dict[bytes, bytes],
        receive: Receive,
        send: Send,
        span: Any,
    ) -> None:
        """Answer one request. ``span``: of it; None without one."""
        given = headers.get(b"x-request-id", b"")
        request_id = given if ID.fullmatch(given) else uuid4().hex.encode()
        fields: dict[str, Any] = {"request_id": request_id.decode()}
        scope.setdefault("state", {})["log_fields"] = fields
        status, begin = 0, time.perf_counter()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                took = b"total;dur=%.1f" % (1000 * (time.perf_counter() - begin))
                ours = [(b"x-request-id", request_id), (b"server-timing", took)]
                message["headers"] = [*message.get("headers", ()), *ours]
            await send(message)

        body = _Body(self, headers, receive)
        polled = scope["path"].startswith(QUIET)
        self.requests += not polled
        HTTP_IN_PROGRESS.inc(not polled)
        try:
            if self.hosts is not None and host_of(headers) not in self.hosts:
                await _refuse(answer, UNKNOWN_HOST, scope["path"])
            else:
                await self.app(scope, body.receive, answer)
        except Exception:
            log.exception("a request failed", extra={"fields": fields})  # the answer, 500, is sent
        except asyncio.CancelledError:  # the drain timeout is over
            if not status:
                await _refuse(answer, STOPPING, scope["path"])
        finally:
            self.requests -= not polled
            HTTP_IN_PROGRESS.dec(not polled)
            body.release()
            seconds = time.perf_counter() - begin
            route = getattr(scope.get("route"), "path", "none")
            HTTP_SECONDS.labels(route, str(status)).observe(seconds)
            fields |= {"method": scope["method"], "path": scope["path"][:200], "status": status}
            fields |= {"ms": round(1000 * seconds, 1), "bytes": body.size}
            if span is not None:
                spans.describe(span, route, fields)
            log.log(_level(status, polled), "request", extra={"fields": fields})


def host_of(headers: Mapping[bytes, bytes]) -> str:
    """The name in the Host header, without port and brackets."""
    name = headers.get(b"host", b"").decode("latin-1").lower()
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]


async def _refuse(send: Send, error: ItemError, path: str) -> None:
    body = json.dumps(error_body(error, path), separators=(",", ":")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _level(status: int, polled: bool) -> int:
    """Log level of a request: server faults are errors, overload and restarts are warnings."""
    if status in (0, 503):  # 0: the connection broke before the answer
        return logging.INFO if polled or status == 0 else logging.WARNING
    if status >= 500:
        return logging.ERROR
    return logging.DEBUG if polled and status == 200 else logging.INFO


class _Body:
    """The incoming body of a request: counted, timed, and refused if it is too large, too slow, or one too many."""

    def __init__(self, guard: Guard, headers: dict[bytes, bytes], receive: Receive) -> None:
        self.guard, self.limits, self._receive = guard, guard.limits, receive
        length = headers.get(b"content-length", b"")
        self.announced = int(length.lstrip(b"0")[:DIGITS] or 0) if length.isdigit() else 0
        self.waits_for_leave = headers.get(b"expect", b"").lower() == b"100-continue"
        self.size = 0
        self.complete = False
        self.end: float | None = None

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()  # until the client hangs up
        if self.end is None:
            self.end = asyncio.get_running_loop().time() + self.limits.body_seconds
            if self.announced > self.limits.body:
                await self._refuse(_too_large(self.limits.body))
        try:
            async with asyncio.timeout_at(self.end):
                message = await self._receive()
        except TimeoutError:
            seconds = self.limits.body_seconds
            raise Refusal(ItemError("slow_body", f"the body took over {seconds:g} s: send it faster")) from None
        length = len(message.get("body", b""))
        self.size += length
        self.guard.body_bytes += length  # bytes received, not bytes announced
        self.complete = not message.get("more_body", False)
        if self.size > self.limits.body:
            await self._refuse(_too_large(self.limits.body))
        if self.guard.body_bytes > self.limits.bodies:
            await self._refuse(ItemError("overloaded", "too many bodies at a time: send it again later"))
        return message

    def release(self) -> None:
        self.guard.body_bytes -= self.size

    async def _refuse(self, error: ItemError) -> None:
        """Drain the body, within limits, before the answer: otherwise a client that is still sending may miss it."""
        if not self.waits_for_leave:
            left = 4 * self.limits.body
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self.end):
                    while not self.complete and left > 0:
                        message = await self._receive()
                        left -= len(message.get("body", b""))
                        self.complete = not message.get("more_body", False)
        raise Refusal(error)


def _too_large(limit: int) -> ItemError:
    return ItemError("body_too_large", f"the body is over {limit / 2**20:g} MiB: send less at a time")
