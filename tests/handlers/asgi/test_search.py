"""POST /v1/search, without a network: what it finds, whom it lets in, and an index that no longer fits."""

import asyncio
import base64
from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from shutil import copytree
from typing import Any

import httpx
import pytest
from PIL import Image

from cascade.engine.batcher import Batcher
from cascade.engine.engine import Engine
from cascade.engine.results import Options
from cascade.offline.index import build, remove
from cascade.offline.index.live import LiveIndex
from cascade.offline.predict import predict_files
from handlers.asgi.app import create_app
from handlers.asgi.keys import Keys
from handlers.asgi.middleware import Guard, Limits
from handlers.asgi.service import Service
from tests.helpers.bundles import handmade, named

KEYS = Keys((("hand", sha256(b"mine").digest()), ("other", sha256(b"theirs").digest())))


@pytest.fixture(scope="module")
def engine(cifar: list[Image.Image]) -> Engine:
    engine = Engine()
    bundle = handmade(cifar[:40])
    engine.add(bundle)
    engine.add(named(bundle, "other"))
    return engine


@pytest.fixture(scope="module")
def index(engine: Engine, cifar: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> LiveIndex:
    folder = tmp_path_factory.mktemp("index")
    for i, image in enumerate(cifar[:30]):
        image.save(folder / f"{i:02d}.png")
    predict_files(engine, [folder], folder / "out", Options(bundle="hand"), embedding="float16")
    lines = [f"{folder / f'{i:02d}.png'},{i / 2},2026-01-{i + 1:02d}" for i in range(30)]
    (folder / "m.csv").write_text("\n".join(["path,price,day", *lines]))
    build(folder / "out", folder / "index", metadata=folder / "m.csv")
    return LiveIndex(folder / "index")


@pytest.fixture(scope="module")
def batcher(engine: Engine) -> Iterator[Batcher]:
    with Batcher(engine) as batcher:
        yield batcher


@pytest.fixture
def guard(batcher: Batcher, index: LiveIndex) -> Iterator[Guard]:
    service = Service(batcher, KEYS, Limits(body=100_000))
    yield create_app(service, index)


def ask(
    guard: Guard, method: str = "POST", path: str = "/v1/search", key: str = "mine", **options: Any
) -> httpx.Response:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://test") as http:
            headers = {"Authorization": f"Bearer {key}"} | options.pop("headers", {})
            return await http.request(method, path, headers=headers, **options)

    return asyncio.run(go())


def png(image: Image.Image) -> bytes:
    image.save(out := BytesIO(), "png")
    return out.getvalue()


def test_the_nearest_in_every_wrapping(guard: Guard, cifar: list[Image.Image]) -> None:
    data = png(cifar[7])
    for method, options in (
        ("POST", {"content": data}),
        ("PUT", {"content": data}),
        ("POST", {"json": {"image": base64.b64encode(data).decode()}}),
        ("POST", {"files": {"photo": data}}),
    ):
        got = ask(guard, method, "/v1/search?k=3", **options).raise_for_status().json()
        assert (got["bundle"], got["version"], got["mode"]) == ("hand", "1", "conditional")
        assert len(got["results"]) == 3
        assert Path(got["results"][0]["path"]).name == "07.png"
        assert got["results"][0]["similarity"] == pytest.approx(1, abs=1e-3)
        own = {"id", "path", "cluster", "ood", "label", "similarity", "metadata"}
        assert set(got["results"][0]) == own and got["results"][0]["id"] == 7


def test_conditions_and_metadata(guard: Guard, cifar: list[Image.Image]) -> None:
    data = png(cifar[7])
    for where, want in (
        ("where=price<2", {0, 1, 2, 3}),
        ("where=price%3E%3D1&where=day<2026-01-05", {2, 3}),
        ("where=path~/07.", {7}),
        ("where=price=-1", set()),
    ):
        got = ask(guard, path=f"/v1/search?{where}", content=data).raise_for_status().json()["results"]
        assert {each["id"] for each in got} == want, where
        assert all(
            each["metadata"] == {"price": each["id"] / 2, "day": f"2026-01-{each['id'] + 1:02d}"} for each in got
        )
    for where in ("price", "color=red", "price=red", "day~1"):
        answer = ask(guard, path=f"/v1/search?where={where}", content=data)
        assert (answer.status_code, answer.json()["error"]["kind"]) == (400, "bad_option"), where


def test_an_update_is_used_at_once(batcher: Batcher, index: LiveIndex, cifar: list[Image.Image]) -> None:
    copied = index.folder.parent / "copied"
    copytree(index.folder, copied)
    live = LiveIndex(copied)
    guard = create_app(Service(batcher), live)
    remove(copied, [7])
    for want in ("07.png", None):  # before and after the server has looked
        names = [Path(each["path"]).name for each in ask(guard, content=png(cifar[7])).json()["results"]]
        assert (names[0] == "07.png") == (want is not None) and len(names) == 10
        live.refresh()


def test_who_may_not(guard: Guard, cifar: list[Image.Image]) -> None:
    data = png(cifar[0])
    kinds = [ask(guard, key=key, content=data).json()["error"]["kind"] for key in ("theirs", "none")]
    assert kinds == ["key_forbidden", "key_unknown"]


def test_bad_requests(guard: Guard) -> None:
    for options, want in (
        ({"content": b"no image"}, (400, "not_an_image")),
        ({"content": b""}, (400, "empty")),
        ({"json": {"picture": ""}}, (400, "bad_request")),
        ({"content": bytes(100_001)}, (413, "body_too_large")),
    ):
        answer = ask(guard, **options)
        assert (answer.status_code, answer.json()["error"]["kind"]) == want
    for k in ("0", "101", "many", "9" * 5000):
        answer = ask(guard, path=f"/v1/search?k={k}", content=b"x")
        assert (answer.status_code, answer.json()["error"]["kind"]) == (400, "bad_option")


def test_a_bundle_that_was_changed(index: LiveIndex, cifar: list[Image.Image]) -> None:
    engine = Engine()
    engine.add(named(handmade(cifar[:40], seed=1), "other"))
    with Batcher(engine) as batcher:
        service = Service(batcher)
        guard = create_app(service, index)
        gone = ask(guard, content=png(cifar[0]))
        assert (gone.status_code, gone.json()["error"]["kind"]) == (409, "index_bundle")
        engine.add(handmade(cifar[:40], seed=1))
        stale = ask(guard, content=png(cifar[0]))
        assert (stale.status_code, stale.json()["error"]["kind"]) == (409, "index_stale")


def test_without_an_index_there_is_no_route(batcher: Batcher) -> None:
    service = Service(batcher)
    assert ask(create_app(service), content=b"x").status_code == 404
