"""A connection's limits, over real sockets and an application that answers at once."""

import asyncio
import socket

import pytest

from handlers.asgi import connection
from tests.helpers.connections import answer, seen, serving

pytestmark = pytest.mark.slow

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "WRITE_SECONDS"):
        monkeypatch.setattr(connection, name, 0.5)


def test_trailers_have_a_limit_and_are_no_headers() -> None:
    async def go() -> None:
        chunked = GET + b"Transfer-Encoding: chunked\r\n\r\n"
        async with serving() as address:
            some = await answer(address, chunked + b"0\r\nX-Evil: 1\r\n\r\n", GET + b"Connection: close\r\n\r\n")
            assert some.count(b" 200 ") == 2 and not any(b"x-evil" in headers for headers in seen)
            many = await answer(address, chunked + b"0\r\n" + b"X: a\r\n" * 10_000)
            assert many.count(b"HTTP/1.1") <= 1

    asyncio.run(go())


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([b""], b" 408 "),
        ([b"GET / HT"], b" 408 "),
        ([b"\r\n"], b" 408 "),
        ([GET + b"Content-Length: 5\r\n\r\nab"], b" 200 "),
        ([GET + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: a\r\n"], b" 200 "),
        ([GET + b"\r\n", b"\r\n"], b" 408 "),
    ],
    ids=["silent", "head", "line break", "body", "trailers", "line break after a request"],
)
def test_what_never_ends_is_closed(parts: list[bytes], status: bytes) -> None:
    async def go() -> None:
        async with serving() as address:
            assert status in (await answer(address, *parts))

    asyncio.run(go())


def test_idle_connections_stay_open_as_long_as_they_may() -> None:
    async def go() -> None:
        async with serving(keep_alive=1.5) as address:
            begin = asyncio.get_running_loop().time()
            await answer(address, GET + b"\r\n")
            assert asyncio.get_running_loop().time() - begin > 1.4

    asyncio.run(go())


def test_clients_that_never_read_are_cut() -> None:
    async def go() -> None:
        async with serving(most=1) as address:
            with socket.socket() as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                slow.connect(address)
                slow.sendall((GET.replace(b"/ ", b"/large ") + b"\r\n") * 100)
                assert b" 503 " in await answer(address)
                for _ in range(100):
                    await asyncio.sleep(0.1)
                    if b" 200 " in await answer(address, GET + b"Connection: close\r\n\r\n"):
                        return
                raise AssertionError("it still has its connection")

    asyncio.run(go())
