"""The client against a server that behaves badly (tests/e2e has the real ones)."""

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade import Client, ItemError, Options, Prediction
from cascade.client import ClientError
from cascade.engine.results import Label, Neighbor
from cascade.open_inference import packed, unpacked
from tests.helpers import certificates

pytestmark = pytest.mark.slow

GOOD = Prediction(
    "birds",
    "2",
    "conditional",
    1,
    0.5,
    0.25,
    ("dispatcher", "expert-1"),
    (Label("owl", 0.75),),
    (Neighbor("a", None, 0.5),),
    np.array([1, -2.5], np.float32),
)
Answer = tuple[int, dict[str, str], bytes] | None
Serve = Callable[..., "Server"]
OVERLOADED: Answer = (503, {"Retry-After": "1"}, json.dumps(ItemError("overloaded", "later").to_json()).encode())
OVER_RATE: Answer = (429, {"Retry-After": "1"}, json.dumps(ItemError("over_rate", "later").to_json()).encode())
OK: Answer = (200, {}, json.dumps(GOOD.to_json()).encode())


class Server(HTTPServer):
    """Gives one answer after the other (None: hangs up), the last one for ever; keeps what it was asked."""

    def __init__(self, answers: list[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = answers, list[tuple[str, dict[str, str], bytes]]()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is None:
            self.close_connection = True
            return
        status, headers, content = answer
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Serve]:
    started: list[tuple[Server, threading.Thread]] = []

    def start(*answers: Answer, tls: ssl.SSLContext | None = None) -> Server:
        server = Server(list(answers))
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
            server.url = server.url.replace("http:", "https:")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        server.server_close()
        thread.join()


def same(a: Any, b: Prediction) -> bool:
    return isinstance(a, Prediction) and a.to_json() == b.to_json()


def test_prediction_comes_back_as_it_was(serve: Serve, tmp_path: Path) -> None:
    server = serve(OK)
    (tmp_path / "image").write_bytes(b"content")
    with Client(server.url, key="secret") as client:
        for image in (b"content", tmp_path / "image", str(tmp_path / "image")):
            got = client.predict(image, Options("birds", mode="conditional", embedding=True, labels=0))
            assert same(got, replace(GOOD, labels=()))
    for path, headers, body in server.asked:
        assert (path, body) == ("/v1/predict", b"content")
        assert headers["authorization"] == "Bearer secret"
        assert headers["x-cascade-bundle"] == "birds" and headers["x-cascade-mode"] == "conditional"
        assert headers["x-cascade-fields"] == "neighbors,embedding" and "x-cascade-version" not in headers
        assert headers["x-cascade-dispatch"] == "top2", "the client's default, whatever the server's is"


def test_no_more_labels_and_neighbors_than_asked_for(serve: Serve) -> None:
    """The server sends five of each."""
    labels = tuple(Label(name, 0.1) for name in "abcde")
    server = serve((200, {}, json.dumps(replace(GOOD, labels=labels, neighbors=GOOD.neighbors * 5).to_json()).encode()))
    with Client(server.url) as client:
        got = client.predict(b"x", Options("böse", labels=1, neighbors=2))
    assert isinstance(got, Prediction) and got.labels == labels[:1] and len(got.neighbors) == 2
    assert server.asked[0][1]["x-cascade-bundle"].encode("latin-1").decode() == "böse"


def test_loopback_is_not_asked_for_through_a_proxy(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Client(serve(OK).url) as client:
        assert isinstance(client.predict(b"x"), Prediction)


def test_a_server_with_a_certificate_of_its_own(serve: Serve, tmp_path: Path) -> None:
    cert, key = certificates.make(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server = serve(OK, tls=context)
    with Client(server.url, ca=cert) as client:
        assert same(client.predict(b"content"), GOOD)
    with Client(server.url) as client, pytest.raises(ClientError, match="CERTIFICATE_VERIFY_FAILED"):
        client.predict(b"content")
    for wrong in (tmp_path / "nothing", key):
        with pytest.raises(ClientError, match="pass the authority's certificate"):
            Client(server.url, ca=wrong)


def test_path_of_the_url_is_where_images_go(serve: Serve) -> None:
    server = serve(OK)
    with Client(server.url + "/predictions/cascade") as client:
        client.predict(b"")
    assert server.asked[0][0] == "/predictions/cascade"


@pytest.mark.parametrize("refusal", [OVERLOADED, OVER_RATE])
def test_patience_outlasts_refusals_and_broken_connections(serve: Serve, refusal: Answer) -> None:
    server = serve(refusal, None, OK)
    begin = time.monotonic()
    with Client(server.url, patience=20) as client:
        assert same(client.predict(b"x"), GOOD)
    assert time.monotonic() - begin >= 1, "Retry-After was heeded"
    assert len(server.asked) == 3


def test_without_patience_the_first_answer_holds(serve: Serve) -> None:
    server = serve(OVERLOADED)
    with Client(server.url) as client:
        assert client.predict(b"x") == ItemError("overloaded", "later")
        assert len(server.asked) == 1
    with Client(serve(None).url) as client, pytest.raises(ClientError, match="is the server running"):
        client.predict(b"x")


@pytest.mark.parametrize("answer", [(507, {}, b""), (413, {}, b"\xff <html>too  large"), (500, {}, b"[]")])
def test_errors_of_others_keep_their_status(serve: Serve, answer: Answer) -> None:
    assert answer is not None
    with Client(serve(answer).url) as client:
        found = client.predict(b"x")
    assert isinstance(found, ItemError) and found.kind == "http"
    assert str(answer[0]) in found.message and "\n" not in found.message


@pytest.mark.parametrize("body", [b"hello", b"[]", b"{}", b'{"bundle": "birds"}'])
def test_answers_that_are_none(serve: Serve, body: bytes) -> None:
    with Client(serve((200, {}, body)).url) as client:
        for ask in (lambda: client.predict(b"x"), client.models, lambda: client.infer([b"x"], "birds")):
            with pytest.raises(ClientError, match="is this a Cascade server"):
                ask()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(ClientError, match="check the path"):
        client.predict(tmp_path / "none")


def test_texts_as_binary_data() -> None:
    texts = [b"", b"a", b"\x00\xff" * 300]
    assert list(unpacked(packed(texts))) == texts
    assert packed([b"ab"]) == b"\x02\x00\x00\x00ab"
    for wrong in (b"\x01", b"\x02\x00\x00\x00a"):
        with pytest.raises(ValueError, match="binary data"):
            list(unpacked(wrong))
