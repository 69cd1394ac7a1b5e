"""/v1/overview: what is loaded, for those who may use it."""

from hashlib import sha256
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from cascade import Engine
from handlers.asgi import overview
from handlers.asgi.app import create_app
from handlers.asgi.keys import Keys
from handlers.asgi.service import Service
from tests.helpers.asgi_app import LIMITS, Ask, client, error


def test_every_loaded_bundle_has_a_card(ask: Ask, engine: Engine, files: list[bytes]) -> None:
    before = {**engine.last_used}
    found = ask("GET", "/v1/overview").json()
    assert [(b["name"], b["version"]) for b in found["bundles"]] == engine.bundles and found["more"] == 0
    assert engine.last_used == before, "to look is not to use"
    birds, _, ships = found["bundles"]
    bundle = engine.loaded[0]
    assert birds["bytes"] == sum(bundle.card.bytes.values()) and birds["size"] == 32
    assert birds["classes"] == bundle.card.classes and birds["number_of_classes"] == len(bundle.card.classes)
    assert birds["out_of_domain"] == (bundle.ood is not None) and not birds["dispatched"]
    assert birds["executor"] == {"kind": "plain", "error": 0.0}
    assert (birds["pictures"], ships["pictures"]) == (0, 20)
    assert found["memory"]["backbone"] == engine.stats()["backbone_bytes"] > 0
    ask("POST", "/v1/predict", content=files[0], headers={"X-Cascade-Bundle": "ships"})
    after = ask("GET", "/v1/overview").json()["bundles"][2]
    assert after["images"] == ships["images"] + 1 and after["seconds"] > ships["seconds"]


def test_unusual_images_are_counted(ask: Ask) -> None:
    """By their out-of-domain score: what drift looks like."""
    before, rose = ask("GET", "/v1/overview").json()["bundles"][2]["unusual"], 0
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out := BytesIO(), "png")
        answer = ask("POST", "/v1/predict", content=out.getvalue(), headers={"X-Cascade-Bundle": "ships"}).json()
        rose += answer["ood"] > 0.95
    assert rose > 0 and ask("GET", "/v1/overview").json()["bundles"][2]["unusual"] == before + rose


def test_only_what_the_key_opens(service: Service) -> None:
    keys = Keys((("birds", sha256(b"mine").digest()),))
    ask = client(create_app(Service(service.batcher, keys, LIMITS)))
    assert error(ask("GET", "/v1/overview")) == (401, "key_missing")
    found = ask("GET", "/v1/overview", headers={"Authorization": "Bearer mine"}).json()
    assert {bundle["name"] for bundle in found["bundles"]} == {"birds"}


def test_no_more_than_a_page_shows(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "MOST", 2)
    found = ask("GET", "/v1/overview").json()
    assert len(found["bundles"]) == 2 and found["more"] == 1
