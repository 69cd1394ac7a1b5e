"""The whole way over HTTP, through a real TorchServe."""

import base64
import json
import random
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import cascade
from cascade.engine.engine import Engine
from cascade.engine.results import Prediction
from cascade.model.decoding import LIMITS
from tests.helpers.http import answer, encoded, error, lone, post, same
from tests.helpers.servers import CLIENT, NotStarted
from tests.helpers.torchserve_server import TorchServe, serving

pytestmark = pytest.mark.e2e


def test_ready_means_that_every_worker_answers(server: TorchServe, photos: list[bytes]) -> None:
    assert [worker["status"] for worker in server.workers()] == ["READY"]
    assert answer(post(server, photos[0], X_Cascade_Bundle="one"))["bundle"] == "one"


def test_answer_is_the_engines(server: TorchServe, engine: Engine, photos: list[bytes]) -> None:
    for mode in ("dispatcher", "conditional", "unconditional"):
        (expected,) = engine.predict(photos[:1], cascade.Options(mode=mode, embedding=True))
        assert isinstance(expected, Prediction)
        fields = "labels,neighbors,embedding"
        response = post(server, photos[0], X_Cascade_Bundle="two", X_Cascade_Mode=mode, X_Cascade_Fields=fields)
        assert same(answer(response), json.loads(json.dumps(expected.to_json())) | {"bundle": "two"})


def test_raw_bodies_json_and_forms(server: TorchServe, photos: list[bytes], cifar: list[Image.Image]) -> None:
    lone = answer(post(server, photos[0], X_Cascade_Bundle="one"))
    raw = post(server, photos[0], Content_Type="application/octet-stream", X_Cascade_Bundle="one")
    assert same(answer(raw), lone)
    for kind in ("jpeg", "webp"):
        body = encoded(cifar[0], kind)
        assert answer(post(server, body, Content_Type=f"image/{kind}", x_cascade_bundle="one"))["bundle"] == "one"
    document = {"image": base64.b64encode(photos[0]).decode(), "bundle": "one", "version": "1"}
    assert same(answer(CLIENT.post(server.url, json=document, headers=server.headers)), lone)
    form = CLIENT.post(server.url, files={"photo": photos[0]}, headers=server.headers | {"X-Cascade-Bundle": "one"})
    assert same(answer(form), lone)


def test_fields_choose_what_is_answered(server: TorchServe, photos: list[bytes]) -> None:
    whole = answer(post(server, photos[0], X_Cascade_Bundle="one"))
    assert whole["neighbors"] and "embedding" not in whole
    bare = answer(post(server, photos[0], X_Cascade_Bundle="one", X_Cascade_Fields="embedding"))
    assert bare["labels"] == bare["neighbors"] == []
    assert np.isfinite(bare["embedding"]).all() and len(bare["embedding"]) > 1
    assert same({key: bare[key] for key in ("cluster", "masks")}, {key: whole[key] for key in ("cluster", "masks")})


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"X_Cascade_Bundle": "three"}, (404, "unknown_bundle")),
        ({"X_Cascade_Bundle": "broken"}, (404, "unknown_bundle")),
        ({"X_Cascade_Bundle": "../one"}, (404, "unknown_bundle")),
        ({"X_Cascade_Bundle": "one", "X_Cascade_Version": "2"}, (404, "unknown_version")),
        ({"X_Cascade_Bundle": "one", "X_Cascade_Mode": "best"}, (400, "unknown_mode")),
        ({"X_Cascade_Bundle": "one", "X_Cascade_Fields": "labels,masks"}, (400, "bad_option")),
        ({"X_Cascade_Bundle": "one", "X_Cascade_Color": "red"}, (400, "unknown_option")),
        ({"X_Cascade_Dispatch": "best"}, (400, "bad_option")),
    ],
)
def test_wrong_options(
    server: TorchServe, photos: list[bytes], headers: dict[str, str], expected: tuple[int, str]
) -> None:
    assert error(post(server, photos[0], **headers)) == expected


def test_an_image_without_a_bundle_is_dispatched(server: TorchServe, photos: list[bytes]) -> None:
    dispatched = answer(post(server, photos[0]))
    assert dispatched["bundle"] in ("one", "two"), "they are alike"
    assert {label["name"] for label in dispatched["dispatch"]["likely"]} == {"one", "two"}


def test_wrong_bodies(server: TorchServe, photos: list[bytes], cifar: list[Image.Image]) -> None:
    def ask(body: bytes, kind: str = "image/png") -> tuple[int, str]:
        return error(post(server, body, Content_Type=kind, X_Cascade_Bundle="one"))

    assert ask(b"hello") == (400, "not_an_image")
    assert ask(b"") == (400, "empty")
    assert ask(photos[0][: len(photos[0]) // 2]) == (400, "truncated")
    assert ask(b"{", "application/json") == (400, "bad_request")
    assert ask(b'{"image": "%%%"}', "application/json") == (400, "bad_request")
    assert ask(encoded(cifar[0], "png", (20_000, 200))) == (413, "too_wide")
    assert ask(photos[0] + bytes(LIMITS.max_bytes)) == (413, "too_large")
    beyond = post(server, bytes(2 * LIMITS.max_bytes), X_Cascade_Bundle="one")
    assert (beyond.status_code, beyond.content) == (413, b""), "TorchServe's own answer"
    assert post(server, photos[0], X_Cascade_Bundle="one").status_code == 200


def test_what_a_client_sends_cannot_spoil_the_log(server: TorchServe) -> None:
    """TorchServe logs a body that is no form with a stack trace; that client must not write to our terminal."""
    body = b"x=%zz\x1b[2J\n2026-01-01 ERROR all is lost\n" + 10_000 * b"x"
    status = post(server, body, Content_Type="application/x-www-form-urlencoded").status_code
    assert status == 500, "TorchServe's own, before our handler is asked"
    log = server.log()
    assert "broken" in log, "the bundle that was refused"
    assert "HttpRequestHandler" in log, "that a request failed"
    assert "%zz" not in log and "\x1b" not in log
    assert not [line for line in log.splitlines() if len(line) > 500 or line.startswith("2026-01-01")]
    assert len(log.splitlines()) < 20


def test_one_bad_image_in_a_batch_of_eight(server: TorchServe, photos: list[bytes], cifar: list[Image.Image]) -> None:
    """A large image keeps the worker busy while eight requests queue up, so that they become one batch."""
    busy = encoded(cifar[0], "jpeg", (6000, 6000))
    bodies = [b"not an image" if i == 3 else photos[i] for i in range(8)]
    batches = []
    for _ in range(20):
        before = server.metrics()
        with ThreadPoolExecutor(9) as pool:
            first = pool.submit(post, server, busy, X_Cascade_Bundle="one")
            time.sleep(0.1)
            eight = list(pool.map(lambda body: post(server, body, X_Cascade_Bundle="one"), bodies))
        assert first.result().status_code == 200
        assert [response.status_code for response in eight] == [200] * 3 + [400] + [200] * 4
        assert error(eight[3]) == (400, "not_an_image")
        after = server.metrics()
        changes = {
            name: after[name] - before[name] for name in ("cascade_batch_images_sum", "cascade_batch_images_count")
        }
        batches.append(tuple(changes.values()))
        if batches[-1] == (8, 2):  # the large one alone, then seven; the one that is no image came to no pass
            return
    pytest.fail(f"never eight in a batch: (images, batches) were {batches}")


def test_interleaved_requests_swap_masks_over_one_backbone(
    server: TorchServe, engine: Engine, cifar: list[Image.Image], backbone_bytes: int, one_mask: int
) -> None:
    """Two bundles, every cluster and mode, eight clients: each answer is the lone request's."""
    some = cifar[:100]
    clusters: dict[int, list[bytes]] = {}
    for image, prediction in zip(some, engine.predict(some), strict=True):
        assert isinstance(prediction, Prediction)
        clusters.setdefault(prediction.cluster, []).append(encoded(image, "png"))
    assert len(clusters) >= 2
    asked = [
        (
            image,
            {
                "X_Cascade_Bundle": bundle,
                "X_Cascade_Mode": mode,
                "X_Cascade_Fields": "labels,neighbors,embedding",
            },
        )
        for images in clusters.values()
        for image in images[:2]
        for bundle in ("one", "two")
        for mode in ("conditional", "dispatcher", "unconditional")
    ]
    lone = [answer(post(server, image, **headers)) for image, headers in asked]
    order = random.Random(0).sample(range(len(asked)), len(asked))

    before = server.metrics()
    scrapes: list[dict[str, float]] = []
    done = threading.Event()

    def scrape() -> None:
        while not done.is_set() or len(scrapes) < 2:
            scrapes.append(server.metrics())

    scraper = threading.Thread(target=scrape)
    scraper.start()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: answer(post(server, asked[i][0], **asked[i][1])), order))
    done.set()
    scraper.join()
    after = server.metrics()

    assert all(same(got, lone[i]) for i, got in zip(order, answers, strict=True))
    assert {got["cluster"] for got in answers} == set(clusters)
    experts = {mask for got in answers for mask in got["masks"]} - {"dispatcher"}
    assert len(experts) >= len(clusters)

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert grown("cascade_mask_misses_total") > len(clusters), "masks were swapped"
    assert grown("cascade_mask_evictions_total") == grown("cascade_mask_misses_total"), "room for a single one"
    counted = Counter((got["bundle"], got["cluster"]) for got in answers)
    for (bundle, cluster), count in counted.items():
        assert grown(f"cascade_requests_total{{bundle={bundle},cluster={cluster},outcome=ok}}") == count
    assert len(scrapes) >= 2
    for earlier, later in zip(scrapes, scrapes[1:], strict=False):
        assert earlier["cascade_mask_misses_total"] <= later["cascade_mask_misses_total"]
    for seen in [*scrapes, after]:
        assert seen["cascade_backbones"] == 1
        assert seen["cascade_materialized_bytes"] <= one_mask
    assert after["cascade_backbone_bytes"] == backbone_bytes
    a_further_bundle = after["cascade_packed_bytes"] / 2
    assert 0 < a_further_bundle < backbone_bytes / 2
    assert after["cascade_bundle_refused{bundle=broken}"] == 1


def test_a_lone_request_waits_for_nobody(server: TorchServe, engine: Engine, photos: list[bytes]) -> None:
    """What HTTP, TorchServe and its batching add to the engine's time stays far below a fixed batch delay."""
    assert lone(server, engine, photos[0]) < 0.05


def test_nothing_but_predictions_and_metrics_listens_outside(store: Path, photos: list[bytes]) -> None:
    """The widest that it can be opened, without tokens too."""
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    with serving(store, host="0.0.0.0", auth=False, log_level="info") as server:
        listening = server.listening()
        assert server.headers == server.keys() == {}
        answered = post(server, photos[0], X_Cascade_Bundle="one", X_Request_Id="mine-7")
        refused = post(server, b"\x1b[2J secret", X_Cascade_Bundle="one", X_Request_Id="two\tparts")
        post(server, b"x=%zz", Content_Type="application/x-www-form-urlencoded")
        assert (answered.status_code, refused.status_code) == (200, 400)
        end = time.monotonic() + 60
        while '"not_an_image"' not in (text := server.log().rpartition("\n")[0]):
            assert time.monotonic() < end
            time.sleep(0.05)
    predictions, metrics, management = (
        httpx.URL(url).port for url in (server.url, server.metrics_url, server.management_url)
    )
    assert {port for ip, port in listening if ip not in loopback} == {predictions, metrics}
    inside = {port for ip, port in listening if ip in loopback}
    assert management in inside and len(inside) == 3, "management, and gRPC's two"

    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines), "every line is JSON"
    assert {"cascade.torchserve", "torchserve"} <= {line["logger"] for line in lines}
    first, second = [line for line in lines if line["message"] == "request"]
    assert (first["status"], first["bundle"], first["client_request_id"]) == (200, "one", "mine-7")
    assert first["request_id"] == answered.headers["x-request-id"]
    assert (second["status"], second["error"]) == (400, "not_an_image") and "client_request_id" not in second
    assert second["request_id"] == refused.headers["x-request-id"]
    assert "secret" not in text and "\x1b" not in text


def test_no_url_is_ever_fetched(server: TorchServe) -> None:
    """TorchServe 0.12 as it comes fetches any URL through its workflow API, even with the model API off."""
    hits: list[str] = []

    class Bait(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Bait) as bait:
        threading.Thread(target=bait.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{bait.server_port}/evil.war"
        CLIENT.get(url)
        assert hits == ["/evil.war"], "the bait works"
        tokens: list[dict[str, str]] = [{}]
        tokens += [{"Authorization": f"Bearer {key['key']}"} for key in server.keys().values()]
        assert len(tokens) == 4
        for base in (server.url, server.management_url):
            root = httpx.URL(base).copy_with(path="/")
            for path in ("workflows", "models"):
                for given in (url, "file:///etc/passwd"):
                    for headers in tokens:
                        status = CLIENT.post(root.join(path), params={"url": given}, headers=headers).status_code
                        assert 400 <= status < 500
        bait.shutdown()
    assert hits == ["/evil.war"]
    assert not list(server.folder.rglob("*evil*"))


def test_predictions_need_the_token(server: TorchServe, photos: list[bytes]) -> None:
    (key_file,) = server.folder.glob("cascade-*/key_file.json")
    assert key_file.stat().st_mode & 0o777 == (server.folder / "token").stat().st_mode & 0o777 == 0o600
    assert key_file.parent.stat().st_mode & 0o777 == 0o700
    keys = server.keys()
    doors = [("POST", server.url), ("GET", str(httpx.URL(server.url).copy_with(path="/ping")))]
    for token in (None, "x", keys["management"]["key"]):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        for method, url in doors if token in keys["management"].values() else [*doors, ("GET", server.management_url)]:
            denied = CLIENT.request(method, url, content=photos[0], headers=headers)
            assert (denied.status_code, denied.json()["type"]) == (400, "InvalidKeyException")
    inference = {"Authorization": f"Bearer {keys['inference']['key']}"}
    assert server.headers == inference
    denied = CLIENT.get(server.management_url, headers=inference)
    assert denied.json()["type"] == "InvalidKeyException", "who may predict may not look at the workers"
    assert post(server, photos[0], X_Cascade_Bundle="one").status_code == 200


def test_metrics_need_the_token(server: TorchServe) -> None:
    """Their labels are the names of bundles."""
    refused = CLIENT.get(server.metrics_url)
    assert refused.status_code == 401 and b"bundle" not in refused.content
    assert server.metrics()["cascade_backbones"] == 1


def test_tokens_are_made_anew_on_sigusr1(server: TorchServe, photos: list[bytes]) -> None:
    before, keys = server.headers, server.keys()
    server.process.send_signal(signal.SIGUSR1)
    end = time.monotonic() + 60
    while server.headers == before:
        assert time.monotonic() < end
        time.sleep(0.05)
    after = server.keys()
    assert all(after[kind]["key"] != keys[kind]["key"] for kind in ("inference", "management"))
    old = CLIENT.post(server.url, content=photos[0], headers=before)
    assert (old.status_code, old.json()["type"]) == (400, "InvalidKeyException")
    assert post(server, photos[0], X_Cascade_Bundle="one").status_code == 200
    assert [worker["status"] for worker in server.workers()] == ["READY"]


def test_binary_answers(server: TorchServe, engine: Engine, photos: list[bytes]) -> None:
    (expected,) = engine.predict(photos[:1], cascade.Options(embedding=True))
    assert isinstance(expected, Prediction) and expected.embedding is not None
    response = post(server, photos[0], X_Cascade_Bundle="two", Accept="application/octet-stream")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/octet-stream")
    np.testing.assert_allclose(np.frombuffer(response.content, "<f4"), expected.embedding, atol=1e-3)
    said = {name.removeprefix("x-cascade-"): v for name, v in response.headers.items() if name.startswith("x-cascade")}
    assert (said["bundle"], said["version"], said["cluster"]) == ("two", "1", str(expected.cluster))
    assert said["masks"].split(",") == list(expected.masks)
    assert float(said["confidence"]) == pytest.approx(expected.confidence, abs=1e-3)
    assert error(post(server, b"x", X_Cascade_Bundle="two", Accept="application/octet-stream"))[0] == 400


def test_store_without_a_usable_bundle_is_one_line(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store / "broken", tmp_path / "broken")
    with pytest.raises(NotStarted) as e, serving(tmp_path):
        pass
    (line,) = str(e.value).splitlines()
    assert line.startswith("error: ") and str(tmp_path) in line and ": broken/1/" in line
