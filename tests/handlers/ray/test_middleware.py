"""What runs in Ray Serve's proxies: the header that routes, and one kind of error for whatever Serve says itself."""

import asyncio
import json
from typing import Any

import pytest

from handlers.ray.middleware import MODEL_ID, Message, Receive, RoutingMiddleware, Send, bundle_of

Headers = list[tuple[bytes, bytes]]
GUARDED = (b"server-timing", b"total;dur=1.0")


def ask(path: str, headers: Headers, status: int, answer: Headers) -> tuple[Headers, list[Message]]:
    """What the application behind it sees as headers, and what the client gets of its answer."""
    seen: Headers = []
    sent: list[Message] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": status, "headers": answer})
        await send({"type": "http.response.body", "body": b"from behind"})

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "raw_path": path.encode(), "headers": headers}
    asyncio.run(RoutingMiddleware(app)(scope, receive, send))
    return seen, sent


@pytest.mark.parametrize(
    "path, headers, bundle",
    [
        ("/v2/models/cats/infer", [], b"cats"),
        ("/v2/models/cats/versions/3/ready", [], b"cats"),
        ("/v2/models/black%20cats", [], b"black cats"),
        ("/v1/map/cats/1", [], b"cats"),
        ("/v1/predict", [(b"x-cascade-bundle", b"cats")], b"cats"),
        ("/v1/predict", [], None),
        ("/v2/models", [(b"x-cascade-version", b"1")], None),
    ],
)
def test_bundle_is_in_the_path_or_the_header(path: str, headers: Headers, bundle: bytes | None) -> None:
    assert bundle_of({"path": path, "raw_path": path.encode()}, headers) == bundle
    seen, _ = ask(path, headers, 200, [GUARDED])
    assert dict(seen).get(MODEL_ID) == bundle


@pytest.mark.parametrize("name", [b"serve_multiplexed_model_id", b"serve-multiplexed-model-id"])
def test_clients_do_not_route(name: bytes) -> None:
    seen, _ = ask("/v1/predict", [(name, b"dogs"), (b"accept", b"*/*")], 200, [GUARDED])
    assert seen == [(b"accept", b"*/*")]


@pytest.mark.parametrize("status", [200, 404, 500, 503])
def test_answers_of_a_replica_pass(status: int) -> None:
    _, sent = ask("/v1/predict", [], status, [GUARDED])
    assert [sent[0]["status"], sent[1]["body"]] == [status, b"from behind"]


@pytest.mark.parametrize("status", [404, 408, 500, 503])
@pytest.mark.parametrize("path", ["/v1/predict", "/v2/models/cats/infer"])
def test_errors_of_serve_itself_say_try_again(path: str, status: int) -> None:
    _, sent = ask(path, [], status, [(b"content-type", b"text/plain")])
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 503 and dict(sent[0]["headers"])[b"retry-after"] == b"1"
    error = json.loads(sent[1]["body"])["error"]
    assert error.startswith("away: ") if path.startswith("/v2") else error["kind"] == "away"


def test_serves_own_paths_stay_its_own() -> None:
    _, sent = ask("/-/healthz", [], 503, [])
    assert [sent[0]["status"], sent[1]["body"]] == [503, b"from behind"]


def test_one_request_id() -> None:
    ids = [(b"x-request-id", b"ours"), (b"X-Request-ID", b"Serve's")]
    _, sent = ask("/v1/predict", [], 200, [GUARDED, *ids])
    assert sent[0]["headers"] == [GUARDED, ids[0]]


@pytest.mark.parametrize("raises", [True, False])
def test_a_replica_that_dies_before_it_answers(raises: bool) -> None:
    sent: list[Message] = []

    async def dying(scope: Any, receive: Receive, send: Send) -> None:
        if raises:
            raise RuntimeError("the actor is dead")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/predict", "headers": []}
    asyncio.run(RoutingMiddleware(dying)(scope, None, send))  # type: ignore[arg-type]
    assert [sent[0]["status"], json.loads(sent[1]["body"])["error"]["kind"]] == [503, "away"]
