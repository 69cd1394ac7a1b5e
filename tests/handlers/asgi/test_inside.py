"""What a bundle is made of, over HTTP: bounded, and for those who may use it."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from PIL import Image

from cascade import Engine
from cascade.bundle.map import Map
from cascade.engine.batcher import Batcher
from handlers.asgi import inside
from handlers.asgi.app import create_app
from handlers.asgi.keys import Keys
from handlers.asgi.service import Service
from tests.conftest import sheet
from tests.helpers.asgi_app import LIMITS, Ask, client, error
from tests.helpers.bundles import handmade, named
from tests.helpers.domains import with_domain

MINE = {"Authorization": "Bearer mine"}


@pytest.fixture(scope="module")
def engine(cifar: list[Image.Image]) -> Engine:
    """Photos with a map, clothes without one, both with a domain; and a network of another kind."""
    engine = Engine()
    places = Map(torch.rand(20, 2, generator=torch.Generator().manual_seed(0)).half(), torch.arange(20).short() % 2)
    photos = with_domain(handmade(cifar[:20], mask_from=1, expert_from=3, size=64), cifar[:100])
    clothes = with_domain(handmade(cifar[:20], mask_from=2, size=64, seed=1), sheet("fashion_mnist")[:100])
    card = photos.card.model_copy(update={"accuracy": {"reliability": {"labels": {"counts": [1]}}}})
    engine.add(replace(named(photos, "photos"), map=places, card=card))
    engine.add(named(clothes, "clothes"))
    engine.add(named(handmade(cifar[:20], backbone="test_efficientnet"), "other"))
    return engine


@pytest.fixture(scope="module")
def batcher(engine: Engine) -> Iterator[Batcher]:
    with Batcher(engine) as batcher:
        yield batcher


@pytest.fixture(scope="module")
def ask(batcher: Batcher) -> Ask:
    return client(create_app(Service(batcher, limits=LIMITS)))


def test_the_map_is_the_bundles(ask: Ask, engine: Engine) -> None:
    answer = ask("GET", "/v1/map/photos/1")
    found, bundle = answer.json(), engine.loaded[2]
    assert bundle.name == "photos" and bundle.map is not None
    torch.testing.assert_close(torch.tensor(found["points"]), bundle.map.points.float(), atol=1e-4, rtol=0)
    assert found["clusters"] == bundle.map.clusters.tolist() and found["names"] == [f"image-{i}" for i in range(20)]
    assert "private" in answer.headers["cache-control"] and answer.headers["vary"] == "Authorization"
    old = ask("GET", "/v1/map/clothes/1").json()
    assert old["points"] == old["clusters"] == [] and len(old["names"]) == 20, "made without a map"
    assert error(ask("GET", "/v1/map/photos/2")) == (404, "unknown_version")


def test_no_more_rows_than_a_page_draws(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "ROWS", 5)
    found = ask("GET", "/v1/map/photos/1").json()
    assert [len(found[name]) for name in ("names", "labels", "points", "clusters")] == [5] * 4 and found["more"] == 15


def test_masks_layer_by_layer(ask: Ask, engine: Engine) -> None:
    found = ask("GET", "/v1/masks/photos/1/dispatcher").json()
    card = engine.loaded[2].card
    assert found["stages"] == card.backbone.stages and not found["delta"]
    off, weights = (sum(layer[name] for layer in found["layers"]) for name in ("off", "weights"))
    assert off / weights == pytest.approx(1 - card.masks[0].density, abs=1e-3)
    assert {layer["stage"] for layer in found["layers"]} == set(range(1, len(card.backbone.stages)))
    other = ask("GET", "/v1/masks/photos/1/dispatcher?other=photos&other_version=1&other_mask=expert-1").json()
    assert {layer["stage"] for layer in other["layers"]} == set(range(3, len(card.backbone.stages)))
    assert other["delta"] is False and other["other_delta"] is False
    either = sum(layer["off"] + layer["other_off"] - layer["both_off"] for layer in other["layers"])
    both, covered = (sum(layer[name] for layer in other["layers"]) for name in ("both_off", "weights"))
    assert (either - both) / covered == pytest.approx(card.masks[2].differs_from_dispatcher, abs=1e-3)
    assert error(ask("GET", "/v1/masks/photos/1/expert-2")) == (404, "unknown_mask")
    assert error(ask("GET", "/v1/masks/photos/1/dispatcher?other=other")) == (409, "other_backbone")


def test_how_sure_it_is(ask: Ask) -> None:
    found = ask("GET", "/v1/reliability/photos/1").json()
    assert found["labels"] == {"counts": [1]} and found["clusters"] is None
    assert sum(found["dispatch"]["counts"]) == 20, "its held-out images"
    assert max(found["dispatch"]["right"]) > 0.5
    assert ask("GET", "/v1/reliability/other/1").json() == {"dispatch": None, "labels": None, "clusters": None}


def test_only_what_the_key_opens(batcher: Batcher) -> None:
    keys = Keys((("photos", sha256(b"mine").digest()),))
    ask = client(create_app(Service(batcher, keys, LIMITS)))
    for kind in ("map", "reliability", "masks", "thumbnails"):
        last = {"masks": "/dispatcher", "thumbnails": "/0"}.get(kind, "")
        assert error(ask("GET", f"/v1/{kind}/photos/1{last}")) == (401, "key_missing")
        assert error(ask("GET", f"/v1/{kind}/clothes/1{last}", headers=MINE)) == (403, "key_forbidden")
    assert ask("GET", "/v1/masks/photos/1/dispatcher", headers=MINE).status_code == 200
    against = "/v1/masks/photos/1/dispatcher?other=clothes"
    assert error(ask("GET", against, headers=MINE)) == (403, "key_forbidden"), "the other one's mask is not its own"
    found = ask("GET", "/v1/reliability/photos/1", headers=MINE).json()
    assert found["dispatch"] is None, "nothing is told of bundles that it may not use"
