"""One engine with handmade bundles, and the ASGI application over it."""

from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from cascade import Engine
from cascade.bundle.thumbnails import make
from cascade.engine.batcher import Batcher
from handlers.asgi.app import create_app
from handlers.asgi.middleware import Guard
from handlers.asgi.service import Service
from tests.helpers.asgi_app import LIMITS, Ask, client
from tests.helpers.bundles import handmade, named


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


@pytest.fixture(scope="module")
def files(cifar: list[Image.Image]) -> list[bytes]:
    found = []
    for image in cifar[:6]:
        image.save(out := BytesIO(), "png")
        found.append(out.getvalue())
    return found
