"""Requests to an ASGI application in this process, without a network."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handlers.asgi.middleware import App, Message


@dataclass
class Answer:
    """An application's answer; its status is 500 if the application fails before it answers.

    Attributes:
        headers: by name in lower case.
    """

    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


async def ask(app: App, method: str, path: str, headers: Mapping[str, str] = {}, *body: bytes) -> Answer:
    """Send a request and wait for its answer. If this is cancelled, so is the request.

    Args:
        path: not quoted. headers: names in lower case.
        body: in parts, which saves the caller joining them.
    """
    answer = Answer()
    fields = [(b"host", b"localhost"), *((name.encode(), value.encode()) for name, value in headers.items())]
    scope: dict[str, Any] = {"type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": path}
    scope |= {"asgi": {"version": "3.0"}, "query_string": b"", "headers": fields, "client": None, "server": None}
    parts = iter([{"body": part, "more_body": True} for part in body] + [{"body": b"", "more_body": False}])

    async def receive() -> Message:
        for part in parts:
            return {"type": "http.request", **part}
        return await asyncio.get_running_loop().create_future()  # the client stays until it has the answer

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    await app(scope, receive, send)
    return answer
