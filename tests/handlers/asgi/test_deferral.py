"""A bundle with two input sizes over HTTP: its modes, which pass answered, and the map of the size that has a bank."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from cascade import Engine
from cascade.engine.batcher import Batcher
from handlers.asgi.app import create_app
from handlers.asgi.service import Service
from tests.helpers.asgi_app import LIMITS, Ask, binary, client, outputs
from tests.helpers.deferral import two_sizes

SIZES = ["input_size", "deferred"]


@pytest.fixture(scope="module")
def ask(cifar: list[Image.Image]) -> Iterator[Ask]:
    """``pair`` asks every image again; ``sure`` none."""
    engine = Engine()
    for name, threshold in (("pair", 1.0), ("sure", 0.0)):
        engine.add(two_sizes(cifar[:20], threshold=threshold, name=name))
    with Batcher(engine, queue=16) as batcher:
        yield client(create_app(Service(batcher, limits=LIMITS)))


@pytest.mark.parametrize(
    ("bundle", "mode", "size", "deferred"),
    [("pair", "", 64, True), ("sure", "adaptive", 32, False), ("pair", "fast", 32, False), ("pair", "full", 64, False)],
)
def test_an_answer_says_which_pass_made_it(
    ask: Ask, files: list[bytes], bundle: str, mode: str, size: int, deferred: bool
) -> None:
    headers = {"X-Cascade-Bundle": bundle} | ({"X-Cascade-Mode": mode} if mode else {})
    answer = ask("POST", "/v1/predict", content=files[0], headers=headers).raise_for_status().json()
    assert answer["deferral"] == {"input_size": size, "deferred": deferred} and answer["mode"] == (mode or "adaptive")
    raw = ask("POST", "/v1/predict", content=files[0], headers=headers | {"Accept": "application/octet-stream"})
    named = raw.headers["x-cascade-input-size"], raw.headers["x-cascade-deferred"]
    assert named == (str(size), str(deferred).lower())


def test_open_inference(ask: Ask, files: list[bytes]) -> None:
    about = ask("GET", "/v2/models/pair").json()["outputs"]
    assert [(each["name"], each["datatype"]) for each in about[-2:]] == [("input_size", "INT64"), ("deferred", "BOOL")]
    got = outputs(ask("POST", "/v2/models/pair/infer", **binary([files[0], b"nothing"])))
    assert got["input_size"].tolist() == [64, 0] and got["deferred"].tolist() == [True, False]
    asked = {"outputs": [{"name": name} for name in SIZES], "parameters": {"mode": "full"}}
    alone = ask("POST", "/v2/models/pair/infer", **binary(files[:1], **asked | {"parameters": {}}))
    assert {name: each["data"] for name, each in by_name(alone).items()} == {"input_size": [64], "deferred": [True]}
    full = ask("POST", "/v2/models/pair/infer", **binary(files[:1], **asked))
    assert {name: each["data"] for name, each in by_name(full).items()} == {"input_size": [64], "deferred": [False]}


def by_name(answer: httpx.Response) -> dict[str, Any]:
    return {each["name"]: each for each in answer.raise_for_status().json()["outputs"]}


def test_the_map_is_of_the_size_that_has_a_bank(ask: Ask) -> None:
    answer = ask("GET", "/v1/map/pair/1").raise_for_status().json()
    assert len(answer["names"]) == 20 and answer["points"] == []  # the map itself was not computed for this bundle
