"""The metrics port under idle, slow, many and unauthorized connections."""

import socket
import time
from contextlib import ExitStack

import httpx
import pytest

from cascade import metrics_server
from cascade.metrics_server import CONNECTIONS, serve

CLIENT = httpx.Client(trust_env=False, timeout=30)


def body() -> bytes:
    return b"cascade_backbones 1\n"


def closed(connection: socket.socket, within: float) -> bool:
    connection.settimeout(within)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_only_metrics() -> None:
    with serve(body, "127.0.0.1", 0) as url:
        answer = CLIENT.get(url)
        assert (answer.status_code, answer.content) == (200, body())
        assert answer.headers["server"] == "cascade" and answer.headers["content-type"].startswith("text/plain")
        assert CLIENT.get(url.replace("/metrics", "/other")).status_code == 404
        assert CLIENT.post(url).status_code == 501


def test_a_token_where_one_is_needed() -> None:
    with serve(body, "127.0.0.1", 0, allowed=lambda header: header == "Bearer secret") as url:
        assert CLIENT.get(url).status_code == 401
        assert CLIENT.get(url, headers={"Authorization": "Bearer other"}).status_code == 401
        assert CLIENT.get(url, headers={"Authorization": "Bearer secret"}).content == body()


def test_idle_and_slow_connections_are_bounded_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "LIFETIME", 2.0)
    with serve(body, "127.0.0.1", 0) as url, ExitStack() as stack:
        port = httpx.URL(url).port
        first = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(CONNECTIONS)
        ]
        for connection in first[::2]:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        time.sleep(0.5)
        more = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        assert closed(more, within=1), "there is no room for another one"
        first[0].sendall(b"a")  # a byte now and then does not prolong it
        assert all(closed(connection, within=20) for connection in first)
        assert CLIENT.get(url).content == body()
