"""Bundles on demand over HTTP: all are listed, and the first request for one loads it."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cascade import Engine
from cascade.bundle.format import write
from cascade.engine.batcher import Batcher
from cascade.engine.journal import _key
from cascade.engine.on_demand import OnDemandRegistry
from cascade.engine.stores import load_store
from handlers.asgi import overview
from handlers.asgi.app import create_app
from handlers.asgi.key_file import read
from handlers.asgi.service import Service
from tests.helpers.asgi_app import LIMITS, Ask, binary, client, error, outputs
from tests.helpers.bundles import handmade
from tests.helpers.keys import digest


@pytest.fixture
def service(cifar: list[Image.Image], tmp_path: Path) -> Iterator[Service]:
    first = write(handmade(cifar[:20], experts=0, size=32), tmp_path / "store" / "birds" / "1")
    for name in ("ships", "cats"):
        shutil.copytree(first, tmp_path / "store" / name / "1")
    registry = load_store(Engine(), tmp_path / "store", cache=tmp_path / "cache", on_demand=True)
    with Batcher(registry.engine) as batcher:
        yield Service(batcher, limits=LIMITS, registry=registry)


@pytest.fixture
def ask(service: Service) -> Ask:
    return client(create_app(service))


def test_every_bundle_is_listed_and_loaded_by_its_first_request(service: Service, ask: Ask, files: list[bytes]) -> None:
    assert ask("GET", "/v2/health/ready").status_code == 200 and not service.engine.names
    listed = {model["name"]: model for model in ask("GET", "/v2/models").json()["models"]}
    assert sorted(listed) == ["birds", "cats", "ships"] and listed["cats"]["versions"] == ["1"]
    assert listed["cats"]["state"] == {"1": {"state": "stored"}}
    answer = ask("POST", "/v1/predict", content=files[0], headers={"X-Cascade-Bundle": "cats"})
    assert answer.json()["bundle"] == "cats" and [*service.engine.names] == ["cats"]
    assert outputs(ask("POST", "/v2/models/ships/infer", **binary(files[:2])))["error"] == ["", ""]
    assert ask("GET", "/v2/models/birds").json()["versions"] == ["1"]
    assert error(ask("POST", "/v1/predict", content=files[0], headers={"X-Cascade-Bundle": "dogs"})) == (
        404,
        "unknown_bundle",
    )
    assert error(ask("POST", "/v1/predict", content=files[0])) == (400, "bundle_missing")


def test_the_overview_has_cards_of_bundles_that_are_not_in_memory(
    service: Service, ask: Ask, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask("POST", "/v1/predict", content=files[0], headers={"X-Cascade-Bundle": "cats"})
    found = ask("GET", "/v1/overview").json()
    assert [(b["name"], b["loaded"]) for b in found["bundles"]] == [("cats", True), ("birds", False), ("ships", False)]
    cats, birds, _ = found["bundles"]
    apart = {"name", "loaded", "executor", "out_of_domain", "pictures", "images", "seconds", "last", "unusual"}
    assert {k: v for k, v in birds.items() if k not in apart} == {k: v for k, v in cats.items() if k not in apart}
    assert [*service.engine.names] == ["cats"] and found["more"] == 0
    monkeypatch.setattr(overview, "MOST", 2)
    found = ask("GET", "/v1/overview").json()
    assert len(found["bundles"]) == 2 and found["more"] == 1


def test_a_bundle_whose_load_was_killed_is_unavailable_until_it_is_tried_again(
    service: Service, ask: Ask, files: list[bytes]
) -> None:
    registry = service.registry
    assert isinstance(registry, OnDemandRegistry)
    ((identity, stamp),) = registry._listing["cats"].items()
    registry.journal._deaths = {_key(identity, stamp): 1}  # what the next process finds
    for method, path in (("POST", "/v1/predict"), ("POST", "/v2/models/cats/infer"), ("GET", "/v2/models/cats")):
        answer = ask(method, path, content=files[0], headers={"X-Cascade-Bundle": "cats"})
        assert answer.status_code == 503 and 50 < int(answer.headers["Retry-After"]) <= 60
        assert "bundle_unavailable" in answer.text and "the engine process died while loading it" in answer.text
    registry._bad = {i: replace(bad, again=0.0) for i, bad in registry._bad.items()}
    assert ask("GET", "/v2/models/cats").status_code == 200


def test_a_key_loads_its_own_bundles_only(service: Service, files: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"birds {digest('one')}\n")
    service.keys = read(tmp_path / "keys")
    ask = client(create_app(service))
    headers = {"Authorization": "Bearer one", "X-Cascade-Bundle": "cats"}
    assert error(ask("POST", "/v1/predict", content=files[0], headers=headers)) == (403, "key_forbidden")
    assert not service.engine.names
    del headers["X-Cascade-Bundle"]  # it opens one bundle, but there may be others: which is meant has to be said
    assert error(ask("POST", "/v1/predict", content=files[0], headers=headers)) == (400, "bundle_missing")
    headers["X-Cascade-Bundle"] = "birds"
    assert ask("POST", "/v1/predict", content=files[0], headers=headers).json()["bundle"] == "birds"
