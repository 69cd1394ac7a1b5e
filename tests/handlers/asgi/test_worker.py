"""When the engine process ends: told to and done, told to and out of time, its batcher gone, or a pass that hangs."""

import asyncio
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from cascade import Engine
from cascade.engine.batcher import PASS_TIMEOUT, Batcher
from cascade.malloc_trim import resident
from handlers.asgi import key_file, tls, worker
from handlers.asgi.app import create_app
from handlers.asgi.service import Service
from handlers.asgi.watched import Watched
from handlers.asgi.worker import Server
from tests.helpers import certificates
from tests.helpers.keys import digest


@pytest.fixture
def server() -> Iterator[Server]:
    with Batcher(Engine()) as batcher:
        service = Service(batcher)
        guard = create_app(service)
        yield Server(uvicorn.Config(guard, log_config=None), service, guard, 60, os.open("/dev/null", os.O_WRONLY))


def leaves(server: Server) -> bool:
    return asyncio.run(server.on_tick(1))


def test_goes_on_until_told(server: Server) -> None:
    server.guard.requests = 0
    assert not leaves(server)
    server.handle_exit(signal.SIGTERM, None)
    assert server.service.stopping and leaves(server)


def test_waits_for_requests_but_not_for_ever(server: Server) -> None:
    server.guard.requests = 1
    server.handle_exit(signal.SIGTERM, None)
    assert not leaves(server)
    end = server.end
    server.handle_exit(signal.SIGTERM, None)
    assert server.end == end, "a second signal gives no new time"
    server.end = 0
    assert leaves(server)


def test_ends_with_its_batcher(server: Server) -> None:
    server.service.batcher.close()
    assert not server.service.ready and leaves(server)


def test_ends_when_a_pass_hangs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(worker.os, "kill", lambda *args: killed.append(args))
    leaves(server)
    assert killed == []
    monkeypatch.setattr(Batcher, "pass_seconds", PASS_TIMEOUT + 1)
    leaves(server)
    assert killed == [(os.getpid(), signal.SIGKILL)]


def test_keys_are_looked_at_every_second(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"* {digest('old')}")
    server.keys = Watched(key_file.read, path)
    path.write_text(f"birds {digest('new')}")
    leaves(server)
    assert server.service.keys is None, "not at every tick"
    asyncio.run(server.on_tick(10))
    assert server.service.keys and server.service.keys.allowed("Bearer new") == {"birds"}


def test_memory_of_large_images_is_given_back(server: Server) -> None:
    """Blocks of a size that the allocator keeps, the last one still in use."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    leaves(server)
    libc.malloc_trim(0)  # what other tests left would be used again, and nothing grow
    begin = resident()
    blocks = [ctypes.c_void_p(libc.malloc(100_000)) for _ in range(3_000)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks[:-1]:
        libc.free(block)
    assert resident() > begin + 200 * 2**20, "the allocator keeps it"
    asyncio.run(server.on_tick(20))
    assert resident() < begin + 50 * 2**20
    libc.free(blocks[-1])


def test_a_renewed_certificate_is_used(server: Server, tmp_path: Path) -> None:
    cert, key = certificates.make(tmp_path)
    server.certificate = Watched(tls.read, cert, key)
    first = server.certificate.value
    certificates.make(tmp_path)
    asyncio.run(server.on_tick(10))
    assert server.certificate.value.chain == cert.read_bytes() != first.chain
