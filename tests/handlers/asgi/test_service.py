"""Who may use what, clients that disconnect, compressed bodies, and draining."""

import asyncio
import base64
import gzip
from concurrent.futures import Future
from io import BytesIO
from typing import Any

import httpx
import pytest
from PIL import Image

from cascade import Engine, Prediction
from cascade.engine.batcher import Batcher
from cascade.engine.fair_queue import Answer
from cascade.engine.tenants import Tenant
from handlers.asgi.app import create_app
from handlers.asgi.keys import Keys
from handlers.asgi.middleware import Guard
from handlers.asgi.service import Service
from tests.helpers.asgi_app import LIMITS, Ask, binary, client, error
from tests.helpers.batching import Held, busy
from tests.helpers.bundles import handmade
from tests.helpers.keys import digest
from tests.helpers.metrics import now


def test_compressed_bodies_are_refused(ask: Ask, files: list[bytes]) -> None:
    headers = {"X-Cascade-Bundle": "birds", "Content-Encoding": "gzip"}
    for path in ("/v1/predict", "/v2/models/birds/infer"):
        assert error(ask("POST", path, content=gzip.compress(files[0]), headers=headers)) == (415, "compressed_body")


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


def test_limits_of_a_tenant(engine: Engine, files: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    slow, quick = (bytes.fromhex(digest(name)) for name in ("slow", "quick"))
    keys = Keys((("*", slow), ("*", quick)), {slow: Tenant("slow", rate=0.1)})
    with Batcher(engine) as batcher, caplog.at_level("INFO", "cascade.http"):
        ask = client(create_app(Service(batcher, keys)))

        def predict(key: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}", "X-Cascade-Bundle": "birds", "X-Cascade-Priority": "batch"}
            return ask("POST", "/v1/predict", content=files[0], headers=headers)

        assert predict("slow").status_code == 200
        refused = predict("slow")
        assert error(refused) == (429, "over_rate") and 8 <= int(refused.headers["retry-after"]) <= 10
        headers = {"Authorization": "Bearer slow"} | binary(files[:2])["headers"]
        many = ask("POST", "/v2/models/birds/infer", content=binary(files[:2])["content"], headers=headers)
        assert error(many) == (429, "over_rate"), "the request as a whole is refused"
        assert predict("quick").status_code == 200, "other tenants have their own limits"
    tenants = [record.fields["tenant"] for record in caplog.records]  # type: ignore[attr-defined]
    assert tenants == ["slow", "slow", "slow", f"key-{digest('quick')[:8]}"]
    assert "Bearer" not in str([vars(record) for record in caplog.records])


def test_priorities(ask: Ask, files: list[bytes]) -> None:
    def predict(priority: str) -> httpx.Response:
        headers = {"X-Cascade-Bundle": "birds", "X-Cascade-Priority": priority}
        return ask("POST", "/v1/predict", content=files[0], headers=headers)

    def infer(priority: object) -> httpx.Response:
        parameters = {"binary_data_output": True, "priority": priority}
        return ask("POST", "/v2/models/birds/infer", **binary(files[:1], parameters=parameters))

    assert predict("batch").status_code == predict("interactive").status_code == 200
    assert error(predict("urgent")) == (400, "bad_option")
    for known in ("batch", "interactive", 0, 1, 2, None):
        assert infer(known).status_code == 200
    for wrong in (3, "urgent"):
        assert error(infer(wrong)) == (400, "bad_request")


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


def test_metrics_name_bundles_and_need_a_key_for_all(engine: Engine) -> None:
    with Batcher(engine) as batcher:
        pairs = (("birds", bytes.fromhex(digest("b"))), ("*", bytes.fromhex(digest("all"))))
        ask = client(create_app(Service(batcher, Keys(pairs))))
        assert error(ask("GET", "/metrics")) == (401, "key_missing")
        assert error(ask("GET", "/metrics", headers={"Authorization": "Bearer b"})) == (403, "key_forbidden")
        assert ask("GET", "/metrics", headers={"Authorization": "Bearer all"}).status_code == 200
