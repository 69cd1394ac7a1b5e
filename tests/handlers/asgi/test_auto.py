"""Requests that name no bundle, over HTTP: each image goes to the bundle that it fits and that its key opens."""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from cascade import Engine
from cascade.engine.batcher import Batcher
from handlers.asgi.app import create_app
from handlers.asgi.key_file import read
from handlers.asgi.service import Service
from tests.conftest import sheet
from tests.helpers.asgi_app import LIMITS, Ask, binary, client, error, outputs
from tests.helpers.bundles import handmade
from tests.helpers.domains import with_domain
from tests.helpers.keys import digest


@pytest.fixture(scope="module")
def batcher() -> Iterator[Batcher]:
    photos, clothes = sheet("cifar10"), sheet("fashion_mnist")
    engine = Engine()
    engine.add(with_domain(handmade(photos[:20], name="photos", mask_from=2, size=32), photos[:200]))
    engine.add(with_domain(handmade(clothes[:20], name="clothes", experts=0, size=32, seed=1), clothes[:200]))
    with Batcher(engine) as batcher:
        yield batcher


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A photo and a piece of clothing, as PNG."""
    found = {}
    for name, data in (("photos", "cifar10"), ("clothes", "fashion_mnist")):
        sheet(data)[205].save(out := BytesIO(), "png")
        found[name] = out.getvalue()
    return found


@pytest.fixture(scope="module")
def ask(batcher: Batcher) -> Ask:
    return client(create_app(Service(batcher, limits=LIMITS)))


@pytest.mark.parametrize("headers", [{}, {"X-Cascade-Bundle": "auto"}, {"X-Cascade-Dispatch": "top2"}])
def test_no_name(ask: Ask, files: dict[str, bytes], headers: dict[str, str]) -> None:
    for name, file in files.items():
        answer = ask("POST", "/v1/predict", content=file, headers=headers).raise_for_status().json()
        assert answer["bundle"] == name and answer["dispatch"]["confidence"] > 0.5
        assert answer["dispatch"]["likely"][0]["name"] == name and len(answer["dispatch"]["likely"]) == 2
    named = ask("POST", "/v1/predict", content=file, headers={"X-Cascade-Bundle": name}).json()
    assert "dispatch" not in named and named["labels"] == answer["labels"]


def test_wrong_dispatch(ask: Ask, files: dict[str, bytes]) -> None:
    headers = {"X-Cascade-Dispatch": "best"}
    assert error(ask("POST", "/v1/predict", content=files["photos"], headers=headers)) == (400, "bad_option")


def test_open_inference(ask: Ask, files: dict[str, bytes]) -> None:
    about = ask("GET", "/v2/models/auto").json()
    assert {"bundle", "bundle_confidence", "label"} <= {output["name"] for output in about["outputs"]}
    assert ask("GET", "/v2/models/auto/ready").json() == {"name": "auto", "ready": True}
    got = outputs(ask("POST", "/v2/models/auto/infer", **binary([*files.values(), b"nothing"])))
    assert got["bundle"] == ["photos", "clothes", ""] and got["error"][2].startswith("400 not_an_image")
    assert got["bundle_confidence"][:2].min() > 0.5 and got["embedding"].shape[0] == 3
    parameters = {"binary_data_output": True, "dispatch": "set"}
    images = [files["photos"]] * 3 + [files["clothes"]]
    got = outputs(ask("POST", "/v2/models/auto/infer", **binary(images, parameters=parameters)))
    assert got["bundle"] == ["photos"] * 4


def test_only_what_the_key_opens(
    batcher: Batcher, files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"photos {digest('one')}\n* {digest('all')}\n")
    ask = client(create_app(Service(batcher, read(path), LIMITS)))
    key = {"Authorization": "Bearer one"}
    answer = ask("POST", "/v1/predict", content=files["photos"], headers=key).raise_for_status().json()
    assert [label["name"] for label in answer["dispatch"]["likely"] if label["score"] > 0] == ["photos"]
    assert "clothes" not in json.dumps(answer), "a caller learns no name of another's bundle"
    other = ask("POST", "/v1/predict", content=files["clothes"], headers={"Authorization": "Bearer all"}).json()
    assert other["bundle"] == "clothes"
    foreign = ask("POST", "/v1/predict", content=files["clothes"], headers=key)
    assert foreign.status_code == 422 or foreign.json()["bundle"] == "photos"
    assert error(ask("POST", "/v1/predict", content=files["photos"])) == (401, "key_missing")
    assert error(ask("GET", "/v2/models/auto")) == (401, "key_missing")


class OneBundle:
    """An engine as it was while it had one bundle."""

    only = "photos"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def test_a_bundle_that_is_loaded_meanwhile_opens_to_no_other_key(
    batcher: Batcher, files: dict[str, bytes], tmp_path: Path
) -> None:
    """Access is checked while there is one bundle, and the image is decoded when there are two."""
    (tmp_path / "keys").write_text(f"photos {digest('one')}\n")
    service = Service(batcher, read(tmp_path / "keys"), LIMITS)
    service.engine = cast(Engine, OneBundle(service.engine))
    key = {"Authorization": "Bearer one"}
    answer = client(create_app(service))("POST", "/v1/predict", content=files["clothes"], headers=key)
    assert answer.status_code == 422 or answer.json()["bundle"] == "photos"
    assert "clothes" not in answer.text


def test_an_unknown_image(ask: Ask, files: dict[str, bytes]) -> None:
    Image.new("RGB", (64, 64), (255, 0, 255)).save(out := BytesIO(), "png")
    pink = out.getvalue()
    assert error(ask("POST", "/v1/predict", content=pink)) == (422, "unknown_domain")
    wrong = {"X-Cascade-Unknown": "label"}
    assert error(ask("POST", "/v1/predict", content=pink, headers=wrong)) == (400, "bad_option")
    asked = {"X-Cascade-Unknown": "embedding"}
    answer = ask("POST", "/v1/predict", content=pink, headers=asked).raise_for_status().json()
    assert (answer["bundle"], answer["cluster"], answer["labels"]) == ("", -1, [])
    assert {label["name"] for label in answer["dispatch"]["likely"]} == {"photos", "clothes"}
    raw = ask("POST", "/v1/predict", content=pink, headers=asked | {"Accept": "application/octet-stream"})
    assert raw.headers["x-cascade-bundle"] == "" and len(raw.content) == 4 * len(answer["embedding"])

    parameters, names = {"binary_data_output": True, "unknown": "embedding"}, ("bundle", "error", "embedding")
    outs = [{"name": name} for name in names]
    got = outputs(ask("POST", "/v2/models/auto/infer", **binary([pink], parameters=parameters, outputs=outs)))
    assert (got["bundle"], got["error"], got["embedding"].shape) == ([""], [""], (1, len(answer["embedding"])))
    both = [pink, files["photos"]]
    mixed = ask("POST", "/v2/models/auto/infer", **binary(both, parameters=parameters, outputs=outs))
    assert error(mixed) == (400, "bad_request"), "embeddings of two widths"
    got = outputs(ask("POST", "/v2/models/auto/infer", **binary(both, parameters=parameters, outputs=outs[:2])))
    assert got["bundle"] == ["", "photos"]
