"""Ready or not, of either front end: TorchServe's management address and the ASGI front end as they answer."""

import json
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from handlers import health
from handlers.torchserve.entrypoint import LOOPBACK, claim_ports
from tests.helpers import certificates


class Answers(BaseHTTPRequestHandler):
    """Says what the two front ends say; the worker's state and the key that it wants are in the class."""

    status = "READY"
    wanted: str | None = None

    def do_GET(self) -> None:
        workers: object = [{"modelName": "cascade", "workers": [{"id": "9000", "status": self.status}]}]
        found = {"/models/cascade": workers, "/v2/health/ready": {"ready": self.status == "READY"}}.get(self.path)
        refused = self.path == "/models/cascade" and self.headers["Authorization"] != self.wanted
        stopping = self.path == "/v2/health/ready" and self.status != "READY"
        self.send_response(400 if refused else 404 if found is None else 503 if stopping else 200)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[int]:
    with HTTPServer((LOOPBACK, 0), Answers) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def port() -> Iterator[int]:
    with serving() as port:
        yield port


@pytest.fixture
def closed() -> int:
    return claim_ports((LOOPBACK, 0))[0]


def key(folder: Path, text: str, age: float = 0) -> None:
    folder.mkdir()
    file = folder / "key_file.json"
    file.write_text(json.dumps({"management": {"key": text}}))
    os.utime(file, (2e9 - age, 2e9 - age))


@pytest.mark.parametrize("auth", [True, False])
def test_torchserve_is_ready_when_its_worker_is(
    port: int, closed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, auth: bool
) -> None:
    monkeypatch.setattr(health, "gettempdir", lambda: str(tmp_path))
    if auth:
        monkeypatch.setattr(Answers, "wanted", "Bearer the-key")
        assert "400 Bad Request" in str(health.not_ready_reason(closed, port))
        key(tmp_path / "cascade-xyz", "the-key")
        key(tmp_path / "cascade-abc", "of a server that was killed", age=9)
    assert health.not_ready_reason(closed, port) is None
    monkeypatch.setattr(Answers, "status", "WORKER_STOPPED")
    assert health.not_ready_reason(closed, port) == "TorchServe's workers: WORKER_STOPPED"


def test_asgi_is_ready_when_it_says_so(port: int, closed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert health.not_ready_reason(port, closed) is None
    monkeypatch.setattr(Answers, "status", "stopping")
    assert health.not_ready_reason(port, closed) == 'ASGI front end: {"ready": false}'


def test_asgi_with_tls(closed: int, tmp_path: Path) -> None:
    """Its certificate is for another name, of an authority that this machine need not trust."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates.make(tmp_path))
    with serving(context) as port:
        assert health.not_ready_reason(port, closed, "https") is None
        assert health.not_ready_reason(port, closed) is not None


def test_nobody_is_there(closed: int) -> None:
    assert "ConnectError" in str(health.not_ready_reason(closed, closed))


def test_the_port_is_that_of_the_environment() -> None:
    assert health.port_of({}) == 8080
    assert health.port_of({"PORT": "9", "CASCADE_SERVE_PORT": "10"}) == 9
    assert health.port_of({"PORT": "", "CASCADE_SERVE_PORT": "10"}) == 10
    assert health.port_of({"CASCADE_SERVE_PORT": "tcp://10.96.0.7:80"}) == 8080
