"""Requests in memory, to applications of a few lines."""

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest

from handlers.asgi.in_memory import ask
from handlers.asgi.middleware import Receive, Send

Scope = MutableMapping[str, Any]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with what it got, in two parts."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    got = json.dumps([scope["method"], scope["path"], headers]).encode()
    await send({"type": "http.response.start", "status": 201, "headers": [(b"x-size", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": got, "more_body": True})
    await send({"type": "http.response.body", "body": body})


def test_a_request_arrives_whole_and_so_does_its_answer() -> None:
    answer = asyncio.run(ask(echo, "PUT", "/a b/../?c", {"x-name": "n"}, b"one", b"two"))
    assert (answer.status, answer.headers) == (201, {"x-size": "6"})
    assert answer.body.endswith(b"onetwo")
    headers = {"host": "localhost", "x-name": "n"}
    assert json.loads(answer.body[:-6]) == ["PUT", "/a b/../?c", headers], "the path as it is"


def test_the_client_stays_until_it_has_the_answer() -> None:
    async def impatient(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(), 0.01)

    assert asyncio.run(ask(impatient, "GET", "/")).status == 500, "it has not answered"


def test_a_request_is_cancelled_with_its_call() -> None:
    async def run() -> None:
        started, cancelled = asyncio.Event(), asyncio.Event()

        async def endless(scope: Scope, receive: Receive, send: Send) -> None:
            started.set()
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()

        task = asyncio.create_task(ask(endless, "GET", "/"))
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
        assert cancelled.is_set() and task.cancelled()

    asyncio.run(run())
