"""The ASGI application in this process, over a real engine with handmade bundles (tests/e2e has the real server)."""

import asyncio
import base64
import gzip
import json
import logging
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from cascade import Engine, Options, Prediction
from cascade.bundle.thumbnails import make
from cascade.engine.batcher import Answer, Batcher
from cascade.logs import JsonLines
from cascade.open_inference import LENGTH_HEADER, packed, unpacked
from handlers.asgi.app import create_app
from handlers.asgi.keys import Keys
from handlers.asgi.middleware import Guard, Limits
from handlers.asgi.service import Service
from handlers.requests import BINARY
from tests.cascade.engine.test_batcher import Held, busy
from tests.cascade.engine.test_engine import embeddings
from tests.cascade.test_metrics import now
from tests.handlers.asgi.test_keys import digest
from tests.helpers.bundles import handmade, named

LIMITS = Limits(body=200_000, bodies=300_000, images=8)
Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def engine(cifar: list[Image.Image]) -> Engine:
    engine = Engine()
    bundle = handmade(cifar[:20], mask_from=3, size=32)
    for name, version in (("birds", "1"), ("birds", "2"), ("ships", "1")):
        pictures = make(cifar[:20]) if name == "ships" else None
        engine.add(replace(named(bundle, name, version), thumbnails=pictures))
    return engine


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[Service]:
    with Batcher(engine, queue=16, max_batch=8) as batcher:
        service = Service(batcher, limits=LIMITS)
        yield service


@pytest.fixture(scope="module")
def guard(service: Service) -> Guard:
    return create_app(service)


@pytest.fixture
def impatient(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies have half a second to come in."""
    monkeypatch.setattr(guard, "limits", replace(LIMITS, body_seconds=0.5))


@pytest.fixture(scope="module")
def ask(guard: Guard) -> Ask:
    return client(guard)


def client(guard: Guard) -> Ask:
    """Requests without a network. An answer must name its request, and an error have one line."""

    def ask(method: str, path: str, **options: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://test") as http:
                return await http.request(method, path, **options)

        answer = asyncio.run(go())
        assert answer.headers["x-request-id"]
        assert guard.requests == guard.body_bytes == 0
        return answer

    return ask


@pytest.fixture(scope="module")
def files(cifar: list[Image.Image]) -> list[bytes]:
    found = []
    for image in cifar[:6]:
        image.save(out := BytesIO(), "png")
        found.append(out.getvalue())
    return found


def error(answer: httpx.Response) -> tuple[int, str]:
    """Status and kind, of either form."""
    body = answer.json()["error"]
    if isinstance(body, str):
        return answer.status_code, body.partition(":")[0]
    assert body["status"] == answer.status_code and "\n" not in body["message"]
    return answer.status_code, body["kind"]


def expected(engine: Engine, files: list[bytes], **wishes: Any) -> list[Prediction]:
    found = engine.predict(files, Options(embedding=True, **wishes))
    assert all(isinstance(each, Prediction) for each in found)
    return found  # type: ignore[return-value]


# --- /v1/predict


def test_one_file_in_every_wrapping(ask: Ask, engine: Engine, files: list[bytes]) -> None:
    (want,) = expected(engine, files[:1], bundle="birds")
    document = {"image": base64.b64encode(files[0]).decode(), "bundle": "birds", "fields": ["labels", "embedding"]}
    headers = {"X-Cascade-Bundle": "birds", "X-Cascade-Fields": "labels,embedding"}
    for method, options in (
        ("POST", {"content": files[0], "headers": headers}),
        ("PUT", {"content": files[0], "headers": headers | {"Content-Type": "image/png"}}),
        ("POST", {"json": document}),
        ("POST", {"files": {"photo": files[0]}, "headers": headers}),
    ):
        got = ask(method, "/v1/predict", **options).raise_for_status().json()
        assert (got["bundle"], got["version"], got["cluster"]) == ("birds", "2", want.cluster)
        assert got["neighbors"] == [] and len(got["labels"]) == 3
        assert want.embedding is not None
        np.testing.assert_allclose(got["embedding"], want.embedding, atol=1e-3)


@pytest.mark.parametrize(
    ("headers", "answer"),
    [
        ({"X-Cascade-Bundle": "cats"}, (404, "unknown_bundle")),
        ({"X-Cascade-Bundle": "birds", "X-Cascade-Version": "3"}, (404, "unknown_version")),
        ({"X-Cascade-Bundle": "birds", "X-Cascade-Mode": "best"}, (400, "unknown_mode")),
        ({"X-Cascade-Bundle": "birds", "X-Cascade-Color": "red"}, (400, "unknown_option")),
        ({}, (400, "bundle_missing")),
    ],
)
def test_wrong_options(ask: Ask, files: list[bytes], headers: dict[str, str], answer: tuple[int, str]) -> None:
    assert error(ask("POST", "/v1/predict", content=files[0], headers=headers)) == answer


def test_wrong_bodies(ask: Ask, files: list[bytes]) -> None:
    def kind(**options: Any) -> tuple[int, str]:
        headers = {"X-Cascade-Bundle": "birds"} | options.pop("headers", {})
        return error(ask("POST", "/v1/predict", headers=headers, **options))

    assert kind(content=b"") == (400, "empty")
    assert kind(content=b"hello") == (400, "not_an_image")
    assert kind(content=files[0][:200]) == (400, "truncated")
    assert kind(content=b"{", headers={"Content-Type": "application/json"}) == (400, "bad_request")
    assert kind(files={"a": b"", "b": b""}) == (400, "bad_request")
    for form in (
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        "multipart/form-data; boundary=x; charset=y",
    ):
        assert kind(content=b"--x\r\nnonsense", headers={"Content-Type": form}) == (400, "bad_request")


def test_options_in_the_query_are_refused(ask: Ask, files: list[bytes]) -> None:
    """Ignored, they would be answered by another bundle, version or mode."""
    for query in ("mode=unconditional", "bundle=birds", "version=1", "x"):
        answer = ask("POST", f"/v1/predict?{query}", content=files[0], headers={"X-Cascade-Bundle": "birds"})
        assert error(answer) == (400, "bad_request") and "X-Cascade-Mode" in answer.text
    assert error(ask("POST", "/v2/models/birds/infer?mode=x", **binary(files))) == (400, "bad_request")


def test_compressed_bodies_are_refused(ask: Ask, files: list[bytes]) -> None:
    headers = {"X-Cascade-Bundle": "birds", "Content-Encoding": "gzip"}
    for path in ("/v1/predict", "/v2/models/birds/infer"):
        assert error(ask("POST", path, content=gzip.compress(files[0]), headers=headers)) == (415, "compressed_body")


def test_names_that_are_not_ascii(cifar: list[Image.Image], files: list[bytes]) -> None:
    engine = Engine()
    for name in ("böse", "日本"):
        engine.add(handmade(cifar[:20], name=name, experts=0, size=32))
    with Batcher(engine) as batcher:
        ask = client(create_app(Service(batcher)))
        for name in ("böse", "日本"):
            headers: dict[str, str | bytes] = {"X-Cascade-Bundle": name.encode(), "X-Cascade-Fields": "embedding"}
            assert ask("POST", "/v1/predict", content=files[0], headers=headers).json()["bundle"] == name
            answer = ask("POST", "/v1/predict", content=files[0], headers=headers | {"Accept": BINARY})
            assert answer.status_code == 200 and dict(answer.headers.raw)[b"x-cascade-bundle"] == name.encode()


def test_paths_that_are_none(ask: Ask) -> None:
    assert error(ask("GET", "/v1/predict")) == (405, "method_not_allowed")
    assert error(ask("GET", "/v3")) == (404, "not_found")
    assert ask("GET", "/v2/nothing").json()["error"].startswith("not_found: ")


# --- Open Inference Protocol


def binary(files: list[bytes], **more: Any) -> dict[str, Any]:
    """A request whose images and answers are binary data."""
    data = packed(files)
    about = {"name": "image", "shape": [len(files)], "datatype": "BYTES"}
    inputs = [about | {"parameters": {"binary_data_size": len(data)}}]
    text = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}} | more).encode()
    return {"content": text + data, "headers": {LENGTH_HEADER: str(len(text))}}


def outputs(answer: httpx.Response) -> dict[str, Any]:
    """Each output as an array, or a list of texts."""
    assert answer.status_code == 200, answer.text
    length = int(answer.headers.get(LENGTH_HEADER, len(answer.content)))
    rest, found = answer.content[length:], {}
    for output in json.loads(answer.content[:length])["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        data, rest = (None, rest) if size is None else (rest[:size], rest[size:])
        kind = {"INT64": "<i8", "FP32": "<f4"}.get(output["datatype"])
        if kind is None:
            texts = output["data"] if data is None else [b.decode() for b in unpacked(data)]
            found[output["name"]] = texts
        else:
            flat = np.asarray(output["data"], kind) if data is None else np.frombuffer(data, kind)
            found[output["name"]] = flat.reshape(output["shape"])
    assert rest == b""
    return found


def test_binary_and_json_give_the_engines_answers(ask: Ask, engine: Engine, files: list[bytes]) -> None:
    want = expected(engine, files, bundle="birds", version="1")
    path = "/v2/models/birds/versions/1/infer"
    texts = [base64.b64encode(each).decode() for each in files]
    plain = {"id": "7", "inputs": [{"name": "image", "shape": [6], "datatype": "BYTES", "data": texts}]}
    nested = {"inputs": [{"name": "image", "shape": [6, 1], "datatype": "BYTES", "data": [[t] for t in texts]}]}
    answers = [ask("POST", path, **each) for each in ({"json": plain}, {"json": nested}, binary(files))]
    assert answers[0].json()["id"] == "7" and answers[0].json()["model_version"] == "1"
    for got in map(outputs, answers):
        assert list(got) == ["cluster", "confidence", "ood", "embedding", "label", "error"]
        assert got["cluster"].tolist() == [each.cluster for each in want]
        np.testing.assert_allclose(got["confidence"], [each.confidence for each in want], atol=1e-3)
        np.testing.assert_allclose(got["embedding"], embeddings(want), atol=1e-3)
        assert got["label"] == [each.labels[0].name for each in want]
        assert got["error"] == [""] * 6


def test_pixels(ask: Ask, engine: Engine, files: list[bytes], cifar: list[Image.Image]) -> None:
    bundle = engine.find("birds", "1")
    transform = bundle.preprocessing.transform()  # type: ignore[union-attr]
    pixels = torch.stack([transform(image) for image in cifar[:2]]).numpy()
    want = [each.cluster for each in expected(engine, files[:2], bundle="birds")]
    about = {"name": "pixels", "shape": list(pixels.shape), "datatype": "FP32"}
    flat, nested = (about | {"data": data} for data in (pixels.ravel().tolist(), pixels.tolist()))
    for document in (flat, nested):
        got = outputs(ask("POST", "/v2/models/birds/infer", json={"inputs": [document]}))
        assert got["cluster"].tolist() == want and got["error"] == ["", ""]
    text = json.dumps({"inputs": [about | {"parameters": {"binary_data_size": pixels.nbytes}}]}).encode()
    headers = {LENGTH_HEADER: str(len(text))}
    got = outputs(ask("POST", "/v2/models/birds/infer", content=text + pixels.tobytes(), headers=headers))
    assert got["cluster"].tolist() == want
    for wrong in (np.nan, np.inf, 1e30):
        broken = pixels.copy()
        broken[0, 0, 0, 0] = wrong
        got = outputs(ask("POST", "/v2/models/birds/infer", content=text + broken.tobytes(), headers=headers))
        assert got["error"][0].startswith("400 bad_pixels: ") and got["error"][1] == ""
    small = {"name": "pixels", "shape": [1, 3, 2, 2], "datatype": "FP32", "data": [0] * 12}
    got = outputs(ask("POST", "/v2/models/birds/infer", json={"inputs": [small]}))
    assert "takes float32 [3, 32, 32]" in got["error"][0]


def test_a_bad_image_has_its_own_error(ask: Ask, files: list[bytes]) -> None:
    got = outputs(ask("POST", "/v2/models/birds/infer", **binary([files[0], b"no image", files[1]])))
    assert got["cluster"][1] == -1 and min(got["cluster"][::2]) >= 0
    assert [text[:17] for text in got["error"]] == ["", "400 not_an_image:", ""]
    assert got["label"][1] == "" and not got["embedding"][1].any() and got["embedding"][0].any()


def test_outputs_and_mode_are_chosen(ask: Ask, engine: Engine, files: list[bytes]) -> None:
    wish = [{"name": "embedding", "parameters": {"binary_data": False}}, {"name": "cluster"}]
    more = {"outputs": wish, "parameters": {"binary_data_output": True, "mode": "dispatcher"}}
    answer = ask("POST", "/v2/models/birds/infer", **binary(files[:2], **more))
    got = outputs(answer)
    assert list(got) == ["embedding", "cluster"] and b'"data":[' in answer.content
    want = expected(engine, files[:2], bundle="birds", mode="dispatcher")
    np.testing.assert_allclose(got["embedding"], embeddings(want), atol=1e-3)
    bad = ask("POST", "/v2/models/birds/infer", **binary(files[:1], parameters={"mode": "best"}))
    assert outputs(bad)["error"][0].startswith("400 unknown_mode: ")


def image(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["AAAA"]} | changes]}


def pixels(**changes: Any) -> dict[str, Any]:
    whole = {"name": "pixels", "shape": [1, 3, 1, 1], "datatype": "FP32", "data": [0, 0, 0]}
    return {"inputs": [whole | changes]}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"inputs": []},
        {"inputs": image()["inputs"] * 2},
        {"inputs": [{}]},
        image(name="picture"),
        image(datatype="FP32"),
        image(shape=[]),
        image(shape=[0]),
        image(shape=[-1]),
        image(shape=[2]),
        image(shape=[1, 2]),
        image(shape=["one"]),
        image(data=None),
        image(data=["***"]),
        image(data=["\u20ac"]),
        image(data=[3]),
        image(data=[None]),
        image(data=[[["AAAA"]]]),
        image(data="AAAA"),
        image(parameters={"binary_data_size": 4}),
        image(data=None, parameters={"binary_data_size": 4}),
        image(parameters={"binary_data_size": "4"}),
        image(parameters={"binary_data_size": -4}),
        image() | {"outputs": [{"name": "color"}]},
        image() | {"parameters": []},
        image() | {"parameters": {"mode": 3}},
        pixels(shape=[1, 3, 1]),
        pixels(shape=[1, 4, 1, 1]),
        pixels(shape=[1, 3, 0, 1]),
        pixels(shape=[1, 3, 10**9, 10**9]),
        pixels(datatype="INT64"),
        pixels(data=["1", "2", "3"]),
        pixels(data=[[0, 0], 0]),
        pixels(data=[0, 0, None]),
        pixels(data=[0, 0]),
        pixels(data={"0": 1}),
    ],
)
def test_requests_that_make_no_sense(ask: Ask, document: Any) -> None:
    answer = ask("POST", "/v2/models/birds/infer", json=document)
    assert error(answer) == (400, "bad_request"), answer.text
    assert "\n" not in answer.json()["error"]


def test_broken_json_and_binary_data(ask: Ask, files: list[bytes]) -> None:
    def kind(content: bytes, length: str | None = None) -> tuple[int, str]:
        headers = {} if length is None else {LENGTH_HEADER: length.encode("latin-1")}
        return error(ask("POST", "/v2/models/birds/infer", content=content, headers=headers))

    for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"inputs":' + b"9" * 5000 + b"}"):
        assert kind(content) == (400, "bad_request")
    good = binary(files[:1])
    text, length = good["content"], good["headers"][LENGTH_HEADER]
    for wrong in ("-1", "x", "", "1" * 30, str(len(text) + 1), "\xb2", str(int(length) - 1)):
        assert kind(text, wrong) == (400, "bad_request")
    assert kind(text + b"more", length) == (400, "bad_request")
    assert kind(text[:-1], length) == (400, "bad_request")
    for data in (b"\x04", b"\xff\xff\xff\xff12", struct.pack("<I", 1) + b"a" + b"\x00\x00"):
        about = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
        head = json.dumps({"inputs": [about]}).encode()
        assert kind(head + data, str(len(head))) == (400, "bad_request")
    assert error(ask("POST", "/v2/models/birds/infer", **binary([b""] * 9))) == (413, "too_many_images")


def test_metadata_and_health(ask: Ask) -> None:
    assert ask("GET", "/v2").json()["extensions"] == ["binary_tensor_data"]
    assert ask("GET", "/v2/models").json() == {
        "models": [
            {"name": "birds", "versions": ["1", "2"], "state": {v: {"state": "ready"} for v in "12"}},
            {"name": "ships", "versions": ["1"], "state": {"1": {"state": "ready"}}},
        ]
    }
    for path in ("/v2/models/birds", "/v2/models/birds/versions/1"):
        about = ask("GET", path).json()
        assert (about["name"], about["versions"]) == ("birds", ["1", "2"])
        assert {"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 32, 32]} in about["inputs"]
        assert {"name": "embedding", "datatype": "FP32", "shape": [-1, 8]} in about["outputs"]
        assert ask("GET", path + "/ready").json() == {"name": "birds", "ready": True}
    assert error(ask("GET", "/v2/models/cats")) == (404, "unknown_bundle")
    assert error(ask("GET", "/v2/models/birds/versions/3/ready")) == (404, "unknown_version")
    assert error(ask("POST", "/v2/models/cats/infer", json={})) == (404, "unknown_bundle")
    assert ask("GET", "/v2/health/live").status_code == ask("GET", "/v2/health/ready").status_code == 200
    assert "cascade_http_seconds" in ask("GET", "/metrics").text


def test_a_version_stands_in_the_path_and_nowhere_else(ask: Ask) -> None:
    for path in ("", "/ready", "/versions/1", "/versions/1/ready"):
        answer = ask("GET", f"/v2/models/birds{path}?version=1")
        assert error(answer) == (400, "bad_request") and "/versions/VERSION" in answer.text
    assert error(ask("POST", "/v2/models/birds/infer?version=1", json={})) == (400, "bad_request")
    paths = ask("GET", "/openapi.json").json()["paths"]
    about = {
        ("/versions/" in p, q["name"], q["in"])
        for p in paths
        if "/v2/models/" in p
        for verb in paths[p].values()
        for q in verb["parameters"]
    }
    assert about == {(False, "model", "path"), (True, "model", "path"), (True, "version", "path")}


def test_thumbnails(ask: Ask, engine: Engine, cifar: list[Image.Image]) -> None:
    pictures = make(cifar[:20])
    for row in (0, 19):
        answer = ask("GET", f"/v1/thumbnails/ships/1/{row}")
        assert answer.status_code == 200 and answer.content == pictures[row]
        assert answer.headers["content-type"] == "image/webp" and answer.headers["x-content-type-options"] == "nosniff"
    for path in ("ships/1/20", "ships/1/-1", "ships/1/x", "ships/1/\u0663", f"ships/1/{'9' * 5000}", "birds/1/0"):
        assert error(ask("GET", f"/v1/thumbnails/{path}")) == (404, "no_thumbnail")
    assert error(ask("GET", "/v1/thumbnails/ships/2/0")) == (404, "unknown_version")
    assert [ask("GET", f"/v1/map/{path}").json()["thumbnails"] for path in ("ships/1", "birds/1")] == [True, False]


def test_description_has_every_path(ask: Ask) -> None:
    whole = ask("GET", "/openapi.json").json()
    assert {"/v1/predict", "/v2/models/{model}/infer", "/v2/health/ready", "/metrics"} <= whole["paths"].keys()
    assert {"InferRequest", "Input"} <= whole["components"]["schemas"].keys()


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


def test_who_hangs_up_costs_no_pass(cifar: list[Image.Image], files: list[bytes]) -> None:
    engine = Held()
    engine.add(handmade(cifar[:20], name="birds", experts=0, size=32))
    dropped = now("dropped_total", why="cancelled")

    async def hang_up(guard: Guard, file: bytes, first: "Future[Answer]") -> list[int]:
        """A request whose client closes the connection once the image waits in the queue."""
        body = [{"type": "http.request", "body": file}]
        statuses = []

        async def receive() -> Any:
            while not body and now("queue_depth") == 0:
                await asyncio.sleep(0.01)
            return body.pop() if body else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            statuses.append(message.get("status", 0))

        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": b"", "headers": []}
        await guard({**scope, "http_version": "1.1", "scheme": "http", "raw_path": b"/v1/predict"}, receive, send)
        engine.go.release(10)
        assert isinstance(await asyncio.to_thread(first.result, 30), Prediction)
        while now("queue_depth"):
            await asyncio.sleep(0.01)
        return statuses

    with Batcher(engine) as batcher:
        service = Service(batcher, limits=LIMITS)
        first = busy(batcher, Image.open(BytesIO(files[0])), "birds")
        assert asyncio.run(hang_up(create_app(service), files[1], first))[0] == 400, "for the log alone"
    assert engine.passes == [["birds"]]
    assert now("dropped_total", why="cancelled") == dropped + 1


def test_keys(engine: Engine, files: list[bytes]) -> None:
    pairs = (("birds", bytes.fromhex(digest("b"))), ("*", bytes.fromhex(digest("all"))))
    with Batcher(engine) as batcher:
        service = Service(batcher, Keys(pairs))
        ask = client(create_app(service))

        def predict(key: str, bundle: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}", "X-Cascade-Bundle": bundle} if key else {}
            return ask("POST", "/v1/predict", content=files[0], headers=headers)

        assert predict("b", "birds").json()["bundle"] == "birds"
        assert predict("all", "ships").json()["bundle"] == "ships"
        assert error(predict("b", "ships")) == (403, "key_forbidden")
        assert error(predict("b", "nothing")) == (403, "key_forbidden"), "which bundles there are is not told"
        assert error(predict("x", "birds")) == (401, "key_unknown")
        assert predict("", "").headers["www-authenticate"] == "Bearer"
        document = {"image": base64.b64encode(files[0]).decode(), "bundle": "ships"}
        headers = {"Authorization": "Bearer b", "X-Cascade-Bundle": "birds"}
        assert error(ask("POST", "/v1/predict", json=document, headers=headers)) == (403, "key_forbidden")
        for path in ("/v2/models/ships", "/v2/models/ships/ready", "/v1/map/ships/1", "/v1/thumbnails/ships/1/0"):
            assert error(ask("GET", path, headers=headers)) == (403, "key_forbidden")
        answer = ask("POST", "/v2/models/ships/infer", headers=headers, content=b"")
        assert error(answer) == (403, "key_forbidden")
        assert [m["name"] for m in ask("GET", "/v2/models", headers=headers).json()["models"]] == ["birds"]
        for path in ("/v2/models", "/v1/map/ships/1", "/v1/thumbnails/ships/1/0"):
            assert error(ask("GET", path)) == (401, "key_missing")
        assert ask("GET", "/v1/thumbnails/ships/1/0", headers={"Authorization": "Bearer all"}).status_code == 200
        assert ask("GET", "/v2/health/ready").status_code == 200


def test_stopping_refuses_new_work_only(service: Service, ask: Ask, files: list[bytes]) -> None:
    service.stopping = True
    try:
        answer = ask("POST", "/v1/predict", content=files[0])
        assert error(answer) == (503, "stopping")
        assert answer.headers["connection"] == "close" and int(answer.headers["retry-after"]) >= 1
        assert ask("POST", "/v2/models/birds/infer", **binary(files)).status_code == 503
        assert ask("GET", "/v2/health/ready").status_code == ask("GET", "/v2/models/birds/ready").status_code == 503
        assert ask("GET", "/v2/health/live").status_code == 200
    finally:
        service.stopping = False


def test_a_fault_is_500_with_an_id_and_in_the_log(
    service: Service, ask: Ask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service.engine, "find", None)
    answer = ask("GET", "/v2/models/birds", headers={"X-Request-Id": "here"})
    assert answer.status_code == 500 and answer.json()["error"].startswith("failed: ")
    fault, request = [json.loads(JsonLines().format(r)) for r in caplog.records if r.levelname == "ERROR"]
    assert fault["request_id"] == request["request_id"] == "here"
    assert "TypeError" in fault["traceback"] and request["status"] == 500
