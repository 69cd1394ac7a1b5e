"""Pins: one version, or several by weight."""

import random
from collections import Counter

import pytest
from PIL import Image

from cascade import Engine, Options, Prediction
from cascade.engine.pins import Pin, parse, pinned
from cascade.engine.results import ItemError
from cascade.errors import CascadeError
from tests.helpers.bundles import handmade, named


def test_a_pin_is_a_version_or_several_with_weights() -> None:
    assert parse("3") == Pin({"3": 1.0}) and str(parse("3")) == "3"
    assert parse("1:95,2:5") == Pin({"1": 95.0, "2": 5.0}) == parse(" 1:95, 2:5")
    assert parse("1:95,2:5").main({"1", "2"}) == "1" and parse("1:95,2:5").main({"2"}) == "2"
    for text in ("3", "1:95,2:5", "1:0.5,b:2"):
        assert parse(text).text == text
    for wrong in ("", " ", "1,2", "1:0,2:5", "1:-1,2:5", "1:95,1:5", ":5", "1:x", "1:nan,2:5", "1:inf,2:5"):
        with pytest.raises(CascadeError, match="versions and weights, like 1:95,2:5"):
            parse(wrong)
    assert pinned(["paper@3", "a@b@1:9,2:1"]) == {"paper": "3", "a@b": "1:9,2:1"}
    with pytest.raises(CascadeError, match="write NAME@VERSION"):
        pinned(["paper"])


def test_traffic_is_split_by_weight(cifar: list[Image.Image]) -> None:
    engine = Engine(executor="plain")
    bundle = handmade(cifar[:20], experts=0, size=32, mask_from=3)
    for version in "123":
        engine.add(named(bundle, "m", version))
    engine.pins = {"m": parse("1:3,2:1")}
    random.seed(0)
    counts = Counter(found.version for _ in range(2000) if not isinstance(found := engine.find("m"), ItemError))
    assert set(counts) == {"1", "2"} and 0.22 < counts["2"] / 2000 < 0.28
    (answer,) = engine.predict(cifar[:1], Options("m", version="3"))
    assert isinstance(answer, Prediction) and answer.version == "3", "a version that is named answers"
    engine.remove("m", "2")
    assert {engine.find("m").version for _ in range(50)} == {"1"}, "what is missing fails no request"  # type: ignore[union-attr]
    engine.remove("m", "1")
    error = engine.find("m")
    assert isinstance(error, ItemError) and error.message == "pinned to version 1 or 2, which is not there; loaded: 3"
