"""The ASGI application in this process, over a real engine with handmade bundles (tests/e2e has the real server)."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade import Engine
from cascade.bundle.thumbnails import make
from cascade.engine.batcher import Batcher
from cascade.logs import JsonLines
from handlers.asgi.app import create_app
from handlers.asgi.service import Service
from handlers.requests import BINARY
from tests.helpers.asgi_app import Ask, binary, client, error, expected
from tests.helpers.bundles import handmade

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


def test_a_query_without_options_does_not_matter_where_there_is_no_body(ask: Ask) -> None:
    """Caches and probes add such; ?version=1 would be answered by the latest version."""
    for path in ("/v2", "/v2/models", "/v2/models/birds", "/v2/models/birds/versions/1/ready", "/v1/map/birds/1"):
        assert ask("GET", f"{path}?probe=1&t=2").status_code == 200, path
    for query in ("version=1", "mode=dispatcher&t=2"):
        assert error(ask("GET", f"/v2/models/birds?{query}")) == (400, "bad_request")


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


def test_metadata_and_health(ask: Ask) -> None:
    assert ask("GET", "/v2").json()["extensions"] == ["binary_tensor_data", "statistics"]
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
        for q in verb.get("parameters", [])
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


def test_a_fault_is_500_with_an_id_and_in_the_log(
    service: Service, ask: Ask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service.engine, "find", None)
    answer = ask("GET", "/v2/models/birds", headers={"X-Request-Id": "here"})
    assert answer.status_code == 500 and answer.json()["error"].startswith("failed: ")
    fault, request = [json.loads(JsonLines().format(r)) for r in caplog.records if r.levelname == "ERROR"]
    assert fault["request_id"] == request["request_id"] == "here"
    assert "TypeError" in fault["traceback"] and request["status"] == 500
