"""Limits of size and time, Host headers, request ids, and the log."""

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from cascade.logs import JsonLines
from handlers.asgi.app import create_app
from handlers.asgi.middleware import Guard, Message, _Body, _level
from handlers.asgi.service import Service
from tests.helpers.asgi_app import LIMITS, Ask, client, error

# --- limits, keys, ids, and the end


def test_sizes(ask: Ask) -> None:
    assert error(ask("POST", "/v1/predict", content=bytes(200_001))) == (413, "body_too_large")

    async def chunks() -> Any:
        for _ in range(30):
            yield bytes(10_000)

    assert error(ask("POST", "/v1/predict", content=chunks())) == (413, "body_too_large")


def test_many_bodies_at_a_time_are_refused(guard: Guard, ask: Ask) -> None:
    guard.body_bytes += 250_000
    try:
        answer = ask_anyhow(guard, content=bytes(100_000))
    finally:
        guard.body_bytes -= 250_000
    assert error(answer) == (503, "overloaded") and int(answer.headers["retry-after"]) >= 1
    assert error(ask("POST", "/v1/predict", content=bytes(100_000))) == (400, "bundle_missing")


def test_bodies_that_do_not_come_keep_nobody_out(guard: Guard, files: list[bytes], impatient: None) -> None:
    """Announced is not sent."""

    async def silent() -> Any:
        yield b"x"
        await asyncio.sleep(1)

    async def go() -> tuple[list[httpx.Response], httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://test") as http:
            headers = {"X-Cascade-Bundle": "birds"}
            slow = [asyncio.create_task(http.post("/v1/predict", content=silent(), headers=headers)) for _ in range(9)]
            await asyncio.sleep(0.1)
            guard.limits = LIMITS  # of the good one
            good = await http.post("/v1/predict", content=files[0], headers=headers)
            return [await each for each in slow], good

    slow, good = asyncio.run(go())
    assert good.status_code == 200
    assert {error(each) for each in slow} == {(408, "slow_body")}
    assert guard.requests == guard.body_bytes == 0


def ask_anyhow(guard: Guard, **options: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://test") as http:
            return await http.post("/v1/predict", **options)

    return asyncio.run(go())


def test_slow_body(ask: Ask, impatient: None) -> None:
    asked = []

    async def slowly() -> Any:
        for i in range(100):
            asked.append(i)
            yield b"x"
            await asyncio.sleep(0.05)

    assert error(ask("POST", "/v1/predict", content=slowly())) == (408, "slow_body")
    assert len(asked) < 80, "not when all of it was there"


@pytest.mark.parametrize("path", ["/v1/predict", "/v2/models/birds/infer"])
def test_a_request_that_is_cut_off_at_the_end_is_told_so(guard: Guard, path: str) -> None:
    sent: list[Message] = []

    async def never() -> Message:
        return await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    async def go() -> None:
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": []}
        slow = asyncio.create_task(guard({**scope, "query_string": b""}, never, send))
        await asyncio.sleep(0.05)
        slow.cancel()
        await slow

    asyncio.run(go())
    body = json.loads(sent[1]["body"])["error"]
    assert sent[0]["status"] == 503 and (body if "v2" in path else body["kind"]).startswith("stopping")
    assert guard.requests == 0


def test_request_ids(ask: Ask) -> None:
    assert ask("GET", "/v2", headers={"X-Request-Id": "a-b.c:7"}).headers["x-request-id"] == "a-b.c:7"
    for wrong in ("", "a b", "x" * 129, "{}"):
        assert len(ask("GET", "/v2", headers={"X-Request-Id": wrong}).headers["x-request-id"]) == 32


def test_log_has_ids_and_no_content(ask: Ask, files: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    secret = "k" * 40
    headers = {"X-Cascade-Bundle": "birds", "X-Request-Id": "one", "Authorization": f"Bearer {secret}"}
    with caplog.at_level(logging.INFO, "cascade.http"):
        ask("POST", "/v1/predict", content=files[0], headers=headers)
        ask("POST", f"/v1/predict?key={secret}", content=files[0], headers=headers)
        ask("GET", "/v2/health/live")
        ask("GET", "/no%0Athing%1B" + "x" * 300)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    about = {"request_id": "one", "bundle": "birds", "version": "2", "status": 200, "bytes": len(files[0])}
    assert len(lines) == 3, "what is polled is not shown"
    assert about.items() <= lines[0].items() and lines[0]["ms"] > 0
    assert lines[1]["error"] == "bad_request" and lines[1]["path"] == "/v1/predict"
    assert lines[2]["error"] == "not_found" and len(lines[2]["path"]) == 200
    for record in caplog.records:
        text = JsonLines().format(record)
        assert secret not in text and "\n" not in text and "\x1b" not in text


def test_hosts(service: Service, files: list[bytes]) -> None:
    """A web page may give its own name the address of loopback."""
    ask = client(create_app(service, hosts=frozenset({"localhost", "::1"})))
    for host, status in (
        ("localhost", 200),
        ("LOCALHOST:8080", 200),
        ("[::1]:8080", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("", 421),
    ):
        assert ask("GET", "/v2", headers={"Host": host}).status_code == status, host
    answer = ask("POST", "/v1/predict", content=files[0], headers={"Host": "evil.example"})
    assert error(answer) == (421, "unknown_host")


def test_lengths_of_thousands_of_digits(guard: Guard) -> None:
    for length, status in ((b"0" * 5000 + b"3", 400), (b"9" * 5000, 413)):
        body = _Body(guard, {b"content-length": length}, None)  # type: ignore[arg-type]
        assert (body.announced > LIMITS.body) == (status == 413)


@pytest.mark.parametrize(
    ("status", "polled", "level"),
    [(200, False, "INFO"), (200, True, "DEBUG"), (404, False, "INFO"), (503, True, "INFO"), (503, False, "WARNING")]
    + [(500, False, "ERROR"), (0, False, "INFO")],
)
def test_levels_of_the_log(status: int, polled: bool, level: str) -> None:
    assert logging.getLevelName(_level(status, polled)) == level
