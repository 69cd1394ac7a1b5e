"""Middleware of Serve's HTTP proxies: routes a request by its bundle, and answers 503 if no replica answered.

The proxies import it through the environment variable in ``ENVIRONMENT``.
"""

import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.middleware import Middleware

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "handlers.ray.middleware:middlewares"}
MODEL_ID = b"serve_multiplexed_model_id"
"""Serve sends a request with this header to a replica that holds the named model, if there is one."""
OURS = b"server-timing"
"""Every answer of a replica has this header (handlers.asgi.middleware); one without it was made by Serve."""
BUNDLE = b"x-cascade-bundle"
PATH = re.compile(rb"/v2/models/([^/]+)|/v1/map/([^/]+)")
log = logging.getLogger("cascade.proxy")
AWAY = "no replica answered: send the request again"


def middlewares() -> list[Middleware]:
    """Called by Serve's proxies when they start."""
    return [Middleware(RoutingMiddleware)]


def bundle_of(scope: MutableMapping[str, Any], headers: Headers) -> bytes | None:
    """The name of the bundle in the path or the header; a name in a JSON body is ignored."""
    if match := PATH.match(scope.get("raw_path") or scope["path"].encode()):
        return unquote_to_bytes(match[1] or match[2])
    return dict(headers).get(BUNDLE)


class RoutingMiddleware:
    """ASGI middleware: adds the header by which Serve routes, and answers 503 if Serve got no answer from a replica.

    A prediction has no side effects, so clients may retry: 503 and Retry-After tell them to.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Serve's own
            return await self.app(scope, receive, send)
        headers = [(n, v) for n, v in scope["headers"] if n.replace(b"-", b"_") != MODEL_ID]
        bundle = bundle_of(scope, headers)
        scope = {**scope, "headers": [*headers, (MODEL_ID, bundle)] if bundle else headers}
        begun = instead = False  # an answer; our 503 instead of Serve's

        async def answer(message: Message) -> None:
            nonlocal begun, instead
            if message["type"] == "http.response.start":
                begun = True
                names = [name.lower() for name, _ in message["headers"]]
                instead = OURS not in names and message["status"] >= 400
                if instead:
                    return await _away(send, scope["path"].startswith("/v2"))
                message["headers"] = _once(b"x-request-id", message["headers"])  # Serve adds its own to ours
            if not instead:
                await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception:  # Serve's, over a replica that died before it answered
            if begun:
                raise
            log.exception("no replica answered")
        if not begun:  # without an exception, too
            await _away(send, scope["path"].startswith("/v2"))


def _once(name: bytes, headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers, with only the first one of this name."""
    first = next(((n, v) for n, v in headers if n.lower() == name), None)
    return [each for each in headers if each[0].lower() != name] + ([] if first is None else [first])


async def _away(send: Send, as_text: bool) -> None:
    error = {"status": 503, "kind": "away", "message": AWAY}
    body = json.dumps({"error": f"away: {AWAY}" if as_text else error}, separators=(",", ":")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
