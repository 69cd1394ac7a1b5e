"""The ASGI front end over real sockets: the engine's answers, unmodified clients, keys, and its end."""

import io
import json
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from select import select

import numpy as np
import pytest
from PIL import Image
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from cascade import Client, Engine, ItemError, Options, Prediction, load
from cascade.bundle.format import write
from cascade.client import ClientError
from cascade.engine.results import Deferral
from cascade.offline.index import add_images, remove
from handlers.torchserve.entrypoint import LOOPBACK, claim_ports
from tests.helpers.asgi_server import Asgi, serving_asgi
from tests.helpers.deferral import two_sizes
from tests.helpers.http import answer, error, lone, post, same
from tests.helpers.servers import CLIENT, NotStarted, Running
from tests.helpers.torments import until

pytestmark = pytest.mark.e2e


def test_answer_is_the_engines(asgi: Asgi, engine: Engine, photos: list[bytes]) -> None:
    for mode in ("dispatcher", "conditional", "unconditional"):
        (expected,) = engine.predict(photos[:1], Options(mode=mode, embedding=True))
        assert isinstance(expected, Prediction)
        fields = "labels,neighbors,embedding"
        response = post(asgi, photos[0], X_Cascade_Bundle="two", X_Cascade_Mode=mode, X_Cascade_Fields=fields)
        assert same(answer(response), json.loads(json.dumps(expected.to_json())) | {"bundle": "two"})


def test_both_front_ends_say_the_same(asgi: Asgi, server: Running, photos: list[bytes]) -> None:
    both = (asgi, server)
    for headers in ({}, {"X_Cascade_Bundle": "one"}, {"X_Cascade_Bundle": "three"}, {"X_Cascade_Color": "red"}):
        for body in (photos[0], b"hello", b"", photos[0][:500]):
            ours, theirs = (post(each, body, **headers) for each in both)
            assert ours.status_code == theirs.status_code
            if ours.status_code == 200:
                assert same(answer(ours), answer(theirs))
            else:
                assert error(ours) == error(theirs)
    ours, theirs = (post(each, photos[0], X_Cascade_Bundle="one", Accept="application/octet-stream") for each in both)
    np.testing.assert_allclose(np.frombuffer(ours.content, "<f4"), np.frombuffer(theirs.content, "<f4"), atol=1e-3)
    assert ours.headers["content-type"] == theirs.headers["content-type"] == "application/octet-stream"
    named = [{name for name in each.headers if name.startswith("x-cascade-")} for each in (ours, theirs)]
    assert named[0] == named[1] >= {"x-cascade-bundle", "x-cascade-cluster", "x-cascade-masks"}


def test_refused_bundles_and_their_reason(asgi: Asgi) -> None:
    models = {each["name"]: each for each in CLIENT.get(f"{asgi.base}/v2/models").json()["models"]}
    assert models["one"]["versions"] == ["1"] and models["one"]["state"] == {"1": {"state": "ready"}}
    assert models["broken"]["versions"] == [] and models["broken"]["state"]["1"]["state"] == "refused"
    reason = models["broken"]["state"]["1"]["reason"]
    answer = CLIENT.get(f"{asgi.base}/v2/models/broken")
    assert answer.status_code == 404 and f"version 1 is refused: {reason}" in answer.json()["error"]
    assert asgi.metrics()["cascade_bundle_refused{bundle=broken}"] == 1


def test_concurrent_requests_keep_their_own_answers(asgi: Asgi, engine: Engine, photos: list[bytes]) -> None:
    want = engine.predict(photos)
    with ThreadPoolExecutor(16) as pool:
        names = ["one", "two"] * 40
        found = list(pool.map(lambda i: answer(post(asgi, photos[i % 10], X_Cascade_Bundle=names[i])), range(80)))
    for i, got in enumerate(found):
        expected = want[i % 10]
        assert isinstance(expected, Prediction)
        assert (got["bundle"], got["cluster"]) == (names[i], expected.cluster)
        assert got["confidence"] == pytest.approx(expected.confidence, abs=1e-3)
    metrics = asgi.metrics()
    assert metrics["cascade_backbones"] == 1 and metrics["cascade_queue_depth"] == 0


def test_a_lone_request_waits_for_nobody(asgi: Asgi, engine: Engine, photos: list[bytes]) -> None:
    assert lone(asgi, engine, photos[0]) < 0.05


def test_unmodified_tritonclient(asgi: Asgi, engine: Engine, photos: list[bytes], cifar: list[Image.Image]) -> None:
    from tritonclient import http

    client = http.InferenceServerClient("{}:{}".format(*asgi.address))
    try:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("one") and client.is_model_ready("one", "1")
        assert not client.is_model_ready("three")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "statistics"]
        assert client.get_model_metadata("one")["inputs"][0]["datatype"] == "BYTES"
        want = [each for each in engine.predict(photos[:4]) if isinstance(each, Prediction)]
        encoded = http.InferInput("image", [4], "BYTES")
        transform = engine.find("small").preprocessing.transform()  # type: ignore[union-attr]
        pictures = [transform(Image.open(io.BytesIO(photo)).convert("RGB")).numpy() for photo in photos[:4]]
        pixels = http.InferInput("pixels", [4, *pictures[0].shape], "FP32")
        for binary in (True, False):
            if binary:  # as JSON it sends texts as they are, and a file is none
                encoded.set_data_from_numpy(np.array(photos[:4], np.object_))
            pixels.set_data_from_numpy(np.stack(pictures), binary_data=binary)
            outputs = [http.InferRequestedOutput(name, binary_data=binary) for name in ("cluster", "label", "error")]
            for tensor in (encoded, pixels):
                result = client.infer("one", [tensor], outputs=outputs, request_id="7", model_version="1")
                assert result.get_response()["id"] == "7"
                assert result.as_numpy("cluster").tolist() == [each.cluster for each in want]
                texts = [each.decode() if isinstance(each, bytes) else each for each in result.as_numpy("label")]
                assert texts == [each.labels[0].name for each in want]
        assert client.infer("one", [pixels]).as_numpy("embedding").shape == (4, 32)
        with pytest.raises(Exception, match="unknown_bundle: no such bundle"):
            client.infer("three", [pixels])
    finally:
        client.close()


def test_our_client_with_both_front_ends(asgi: Asgi, server: Running, engine: Engine, photos: list[bytes]) -> None:
    (expected,) = engine.predict(photos[:1], Options(embedding=True, neighbors=0))
    assert isinstance(expected, Prediction) and expected.embedding is not None
    token = server.headers["Authorization"].removeprefix("Bearer ")
    for url, key in ((asgi.base, None), (asgi.url, None), (server.url, token)):
        with Client(url, key=key) as client:
            got = client.predict(photos[0], Options("one", "1", embedding=True, neighbors=0))
            assert isinstance(got, Prediction) and got.embedding is not None
            assert (got.cluster, got.masks, got.neighbors) == (expected.cluster, expected.masks, ())
            np.testing.assert_allclose(got.embedding, expected.embedding, atol=1e-3)
            wrong = client.predict(b"no image", Options("one"))
            assert isinstance(wrong, ItemError) and wrong.kind == "not_an_image"
    with Client(asgi.base) as client:
        assert client.models() == {"one": ["1"], "two": ["1"], "broken": []}
        found = client.infer([photos[0], b"no image"], "one", "1", "conditional")
        assert found["cluster"].tolist() == [expected.cluster, -1]
        assert found["error"][0] == "" and found["error"][1].startswith("400 not_an_image")
        assert client.infer(np.zeros((2, 3, 32, 32), np.float32), "one", outputs=["ood"])["ood"].shape == (2,)
        with pytest.raises(ClientError, match="no such bundle"):
            client.infer(photos[:1], "three")
    with Client(server.url) as client, pytest.raises(ClientError):
        client.models()
    with (
        Client("http://127.0.0.1:9", patience=0.3) as client,
        pytest.raises(ClientError, match="is the server running"),
    ):
        client.predict(photos[0])


def test_long_and_invalid_heads_are_refused(asgi: Asgi) -> None:
    """Slow ones, too: tests/handlers/asgi/test_connection.py."""

    def talk(request: bytes) -> bytes:
        with socket.create_connection(asgi.address, timeout=60) as connection:
            connection.sendall(request)
            found = b""
            try:
                while chunk := connection.recv(65536):
                    found += chunk
            except ConnectionResetError:
                pass
            return found.partition(b"\r\n")[0]

    start = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n"
    assert b" 431 " in talk(start + b"X: " + b"x" * 20_000)
    many = b"".join(b"X-%d: y\r\n" % i for i in range(5_000))
    assert b" 431 " in talk(start + many + b"\r\n")
    assert b" 431 " in talk(b"GET /" + b"x" * 70_000)
    assert b" 400 " in talk(b"this is no HTTP\r\n\r\n")
    assert asgi.answers()


def test_search(asgi: Asgi, indexed: list[Path]) -> None:
    for photo in indexed:
        found = CLIENT.post(f"{asgi.base}/v1/search", params={"k": 3}, content=photo.read_bytes()).raise_for_status()
        answer = found.json()
        assert (answer["bundle"], answer["version"], len(answer["results"])) == ("one", "1", 3)
        nearest = answer["results"][0]
        assert nearest["path"] == str(photo) and nearest["similarity"] == pytest.approx(1, abs=1e-3)
    for body, params, want in (
        (b"no image", {}, (400, "not_an_image")),
        (photo.read_bytes(), {"k": 1000}, (400, "bad_option")),
    ):
        assert error(CLIENT.post(f"{asgi.base}/v1/search", params=params, content=body)) == want


def test_the_server_uses_a_changed_index(
    asgi: Asgi, store: Path, index: Path, cifar: list[Image.Image], tmp_path: Path
) -> None:
    """Without a restart, within seconds."""
    cifar[50].save(new := tmp_path / "new.png")

    def nearest() -> str:
        found = CLIENT.post(f"{asgi.base}/v1/search", params={"k": 1}, content=new.read_bytes()).raise_for_status()
        return str(found.json()["results"][0]["path"])

    assert nearest() != str(new)
    change = add_images(index, load(store / "one" / "1"), [new])
    until(lambda: nearest() == str(new), 60)
    remove(index, [change.about.next_id - 1])
    until(lambda: nearest() != str(new), 60)


def test_keys_over_http(store: Path, photos: list[bytes], cifar: list[Image.Image], tmp_path: Path) -> None:
    """And by gRPC; and two input sizes, whose metrics are asked for with a key."""
    store = shutil.copytree(store, tmp_path / "store")
    write(two_sizes(cifar[:20], threshold=1.0), store / "sizes" / "1")
    file = tmp_path / "keys"
    file.write_text(f"one {sha256(b'secret-of-one').hexdigest()}\n")
    (port,) = claim_ports((LOOPBACK, 0))
    with serving_asgi(
        store, "--api-keys", str(file), "--connections", "4", "--grpc-port", str(port), "--on-demand"
    ) as server:
        with Client(server.url, key="secret-of-one") as client:
            assert isinstance(client.predict(photos[0], Options("one")), Prediction)
            for bundle, kind in (("two", "key_forbidden"), ("none", "key_forbidden")):
                refused = client.predict(photos[0], Options(bundle))
                assert isinstance(refused, ItemError) and refused.kind == kind
        assert error(post(server, photos[0])) == (401, "key_missing")
        two = {"Authorization": "Bearer secret-of-two", "X_Cascade_Bundle": "two"}
        assert error(post(server, photos[0], **two)) == (401, "key_unknown")
        keys = {"two": b"secret-of-two", "*": b"secret-of-all"}
        (tmp_path / "new").write_text("".join(f"{name} {sha256(key).hexdigest()}\n" for name, key in keys.items()))
        (tmp_path / "new").rename(file)
        until(lambda: post(server, photos[0], **two).status_code == 200)
        assert error(post(server, photos[0], Authorization="Bearer secret-of-one")) == (401, "key_unknown")
        server.worker().kill()
        until(server.answers)
        assert CLIENT.get(server.metrics_url).status_code == 401
        metrics = CLIENT.get(server.metrics_url, headers={"Authorization": "Bearer secret-of-all"}).text
        assert "cascade_engine_restarts_total 1.0" in metrics
        with Client(server.url, key="secret-of-all") as client:
            again = client.predict(photos[0], Options("sizes"))
        assert isinstance(again, Prediction) and again.deferral == Deferral(64, True)
        metrics = CLIENT.get(server.metrics_url, headers={"Authorization": "Bearer secret-of-all"}).text
        assert 'cascade_deferred_total{bundle="sizes"} 1.0' in metrics
        assert post(server, photos[0], **two).status_code == 200
        with triton.InferenceServerClient(f"{LOOPBACK}:{port}") as grpc:
            image = triton.InferInput("image", [1], "BYTES")
            image.set_data_from_numpy(np.array(photos[:1], object))
            headers = {"authorization": "Bearer secret-of-two"}
            assert grpc.infer("two", [image], headers=headers).as_numpy("error").tolist() == [b""]
            with pytest.raises(InferenceServerException, match="key_missing"):
                grpc.infer("two", [image])
        assert "secret-of" not in server.log()
        too_many_connections(server)


def too_many_connections(server: Asgi) -> None:
    """A server that takes four connections says so to the fifth, and takes others when those have gone."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(server.address, timeout=60)) for _ in range(5)]
        refused, _, _ = select(held, [], [], 60)
        assert refused and not select(held[:3], [], [], 0.2)[0], "the tests' client may keep one"
        refusal = refused[0].recv(65536)
        assert refusal.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in refusal
        assert refused[0].recv(1) == b"", "closed"
    until(server.answers)


def test_the_end_does_not_wait_longer_than_the_drain_time(store: Path, photos: list[bytes]) -> None:
    """A client that sends its body at leisure."""
    with serving_asgi(store, "--drain", "1") as server, socket.create_connection(server.address) as slow:
        slow.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx")
        until(lambda: server.metrics()["cascade_http_in_progress"] == 1)
        assert server.end(signal.SIGTERM) == 0
        assert slow.recv(65536).startswith(b"HTTP/1.1 503 ")
        assert "is killed" not in server.log() and "Traceback" not in server.log(), "the engine ends by itself"


def test_what_cannot_start_is_one_line(store: Path, asgi: Asgi, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "keys").write_text("nonsense")
    cases: tuple[tuple[tuple[Path | str, ...], str], ...] = (
        ((tmp_path / "store",), "no bundle could be loaded"),
        ((store, "--api-keys", str(tmp_path / "keys")), "line 1: write BUNDLE"),
        ((store, "--port", str(asgi.address[1])), "choose another address or port"),
        ((store, "--host", "0.0.0.0"), "add --api-keys FILE, or --no-auth"),
    )

    def said(options: tuple[Path | str, ...]) -> str:
        with pytest.raises(NotStarted) as e, serving_asgi(*map(str, options)):
            pass
        return str(e.value)

    with ThreadPoolExecutor(len(cases)) as pool:
        for text, (_, message) in zip(pool.map(said, [options for options, _ in cases]), cases, strict=True):
            lines = [line for line in text.splitlines() if not line.startswith("{")]
            assert lines[0].startswith("error: ") and message in lines[0]
            assert len(lines) <= 2
