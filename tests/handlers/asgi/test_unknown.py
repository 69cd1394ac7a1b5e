"""Kept images over HTTP: for admins alone, and as an archive that training reads."""

import tarfile
from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from cascade import Engine
from cascade.bundle.format import write
from cascade.engine.batcher import Batcher
from cascade.engine.registry import Registry
from cascade.engine.stores import load_store
from cascade.engine.unknown import UnknownImages
from handlers.asgi.app import create_app
from handlers.asgi.keys import Keys
from handlers.asgi.service import Service
from tests.conftest import sheet
from tests.helpers.asgi_app import LIMITS, Ask, client, error
from tests.helpers.bundles import handmade, named
from tests.helpers.domains import with_domain

ADMIN, CUSTOMER = ({"Authorization": f"Bearer {key}"} for key in ("admin", "customer"))
DIGESTS = [sha256(key).digest() for key in (b"admin", b"customer")]
KEYS = Keys(tuple(("*", digest) for digest in DIGESTS), admins=frozenset(DIGESTS[:1]))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two bundles of clothes."""
    store, images = tmp_path_factory.mktemp("store"), sheet("fashion_mnist")
    bundle = with_domain(handmade(images[:20], name="clothes", experts=0, size=64), images[:200])
    for name in ("clothes", "others"):
        write(named(bundle, name), store / name / "1")
    return load_store(Engine(), store)


@pytest.fixture(scope="module")
def ask(registry: Registry) -> Iterator[Ask]:
    with Batcher(registry.engine) as batcher:
        yield client(create_app(Service(batcher, KEYS, LIMITS), registry=registry))


@pytest.fixture(scope="module")
def unknown(registry: Registry, ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> UnknownImages:
    """Ten photos were sent; some of them resemble clothes to a random network."""
    with UnknownImages(tmp_path_factory.mktemp("unknown"), 100, 2**20) as unknown:
        registry.engine.unknown = unknown
        refused = 0
        for photo in sheet("cifar10")[200:210]:
            photo.save(out := BytesIO(), "png")
            answer = ask("POST", "/v1/predict", content=out.getvalue(), headers=CUSTOMER)
            refused += answer.status_code == 422 and error(answer)[1] == "unknown_domain"
    assert len(unknown.listed()) == refused >= 5
    return unknown


def test_list(ask: Ask, unknown: UnknownImages) -> None:
    body = ask("GET", "/v1/unknown", headers=ADMIN).raise_for_status().json()
    names = [kept.name for kept in unknown.listed()]
    assert body["count"] == len(names) and body["most"] == {"count": 100, "bytes": 2**20}
    assert [each["name"] for each in body["newest"]] == names[::-1]
    assert body["bytes"] == sum(each["bytes"] for each in body["newest"])
    assert body["newest"][0]["time"] >= body["newest"][-1]["time"] > 1.7e9


def test_picture(ask: Ask, unknown: UnknownImages) -> None:
    name = unknown.listed()[0].name
    answer = ask("GET", f"/v1/unknown/{name}", headers=ADMIN).raise_for_status()
    assert answer.headers["content-type"] == "image/jpeg" and answer.content == unknown.read(name)
    assert Image.open(BytesIO(answer.content)).size == (32, 32)
    for other in ("0" * 13 + "-" + "0" * 16 + ".jpg", "..%2Fkeys"):
        assert error(ask("GET", f"/v1/unknown/{other}", headers=ADMIN))[0] == 404


def test_archive(ask: Ask, unknown: UnknownImages, tmp_path: Path) -> None:
    answer = ask("GET", "/v1/unknown.tar", headers=ADMIN).raise_for_status()
    assert answer.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path, filter="data")
    files = sorted((tmp_path / "unknown").iterdir())
    assert [file.read_bytes() for file in files] == [unknown.read(kept.name) for kept in unknown.listed()]


@pytest.mark.parametrize("path", ["/v1/unknown", "/v1/unknown.tar", "/v1/unknown/0000000000000-0000000000000000.jpg"])
def test_admins_only(ask: Ask, registry: Registry, unknown: UnknownImages, path: str) -> None:
    assert error(ask("GET", path, headers=CUSTOMER)) == (403, "key_not_admin")
    assert error(ask("GET", path)) == (401, "key_missing")
    registry.engine.unknown = None
    try:
        assert error(ask("GET", path, headers=ADMIN)) == (404, "keeping_off")
    finally:
        registry.engine.unknown = unknown
