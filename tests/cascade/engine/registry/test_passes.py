"""Passes go on while the registry loads and removes, and many bundles share the memory."""

import gc
import shutil
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from PIL import Image

from cascade import Engine, Options, Prediction
from cascade.bundle.format import Bundle, write
from cascade.engine.items import Item
from cascade.engine.stores import load_store
from cascade.errors import CascadeError
from cascade.model import backbone as backbones
from tests.helpers.bundles import named
from tests.helpers.registry import ask, states


def test_loading_a_backbone_holds_up_no_pass(
    other: Bundle, small: Path, monkeypatch: pytest.MonkeyPatch, cifar: list[Image.Image]
) -> None:
    engine = Engine()
    registry = load_store(engine, small)
    write(other, small / "b/1")
    entered, leave, load = threading.Event(), threading.Event(), backbones.load

    def slow(*args: object, **kwargs: object) -> backbones.Backbone:
        entered.set()
        assert leave.wait(30)
        return load(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(backbones, "load", slow)
    loader = threading.Thread(target=registry.reload)
    loader.start()
    try:
        assert entered.wait(30)
        assert ask(engine, cifar[0]) == "1"
        assert states(registry) == {"a/1": "ready", "b/1": "loading"}
        assert ask(engine, cifar[0], bundle="b") == "unknown_bundle"
    finally:
        leave.set()
        loader.join()
    assert ask(engine, cifar[0], bundle="b") == "1"


def test_removal_waits_for_its_requests(hand: Bundle, other: Bundle, small: Path, cifar: list[Image.Image]) -> None:
    write(other, small / "b/1")
    engine = Engine()
    registry = load_store(engine, small)
    before = engine.stats()
    assert before["backbones"] == 2
    backbone = weakref.ref(
        next(e for f, e in engine.resident.executors.items() if f == other.card.backbone.fingerprint).backbone
    )
    waiting = [engine.prepare(cifar[0], Options(bundle="b")) for _ in range(2)]
    items = [item for item in waiting if isinstance(item, Item)]
    del waiting
    shutil.rmtree(small / "b")
    registry.reload()
    assert states(registry) == {"a/1": "ready", "b/1": "removed"}
    assert ask(engine, cifar[0], bundle="b") == "unknown_bundle"
    assert engine.stats()["backbones"] == 2, "two requests still need it"
    assert [answer.bundle for answer in engine.run(items) if isinstance(answer, Prediction)] == ["b", "b"]
    items.clear()
    registry.reload()
    engine.predict(cifar[:1], Options(bundle="a"))
    after = engine.stats()
    assert after["backbones"] == 1 and after["backbone_bytes"] < before["backbone_bytes"]
    assert after["materialized_bytes"] < before["materialized_bytes"]
    gc.collect()
    assert backbone() is None, "its memory is free"
    write(other, small / "b/2")
    registry.reload()
    assert ask(engine, cifar[0], bundle="b") == "2"


def test_remove_says_what_is_not_there() -> None:
    with pytest.raises(CascadeError, match="bundle a/1 is not loaded"):
        Engine().remove("a", "1")


def test_two_hundred_bundles_over_one_backbone(hand: Bundle, tmp_path: Path, cifar: list[Image.Image]) -> None:
    whole = write(hand, tmp_path / "store/b000/1")
    for i in range(1, 200):
        shutil.copytree(whole, tmp_path / f"store/b{i:03}/1")
    process = psutil.Process()
    engine = Engine(budget_bytes=8 * 2**20)
    start, memory = time.process_time(), process.memory_info().rss
    registry = load_store(engine, tmp_path / "store")
    seconds, grown = time.process_time() - start, process.memory_info().rss - memory
    stats = engine.stats()
    assert (stats["bundles"], stats["backbones"]) == (200, 1)
    print(f"200 bundles: {seconds:.1f} s of CPU, {grown / 2**20:.0f} MB grown, {stats}")
    assert stats["packed_bytes"] == 200 * hand.bytes()
    assert grown < stats["packed_bytes"] + stats["backbone_bytes"] + stats["budget_bytes"] + 100 * 2**20
    start = time.process_time()
    registry.reload()
    assert time.process_time() - start < seconds / 2, "a look at an unchanged store reads no bundle"
    asked = [Options(bundle=f"b{i:03}") for i in range(0, 200, 10)]
    assert {getattr(a, "bundle", a) for a in engine.predict([cifar[0]] * 20, asked)} == {o.bundle for o in asked}


def test_backbones_side_by_side_within_a_budget(
    hand: Bundle, other: Bundle, small: Path, monkeypatch: pytest.MonkeyPatch, cifar: list[Image.Image]
) -> None:
    probe = Engine()
    for bundle in (named(hand, "a"), named(other, "b")):
        probe.add(bundle)
    stats = probe.stats()
    need = stats["backbone_bytes"] + stats["packed_bytes"]
    write(other, small / "b/1")
    engine = Engine(memory_bytes=need)
    assert states(load_store(engine, small)) == {"a/1": "ready", "b/1": "ready"}

    engine = Engine(memory_bytes=need - 1)
    registry = load_store(engine, small)
    assert states(registry) == {"a/1": "ready", "b/1": "refused"}
    reason = registry.states("b")[0].reason or ""
    assert reason.startswith("bundle b/1 needs ") and f"of {need - 1} are taken: give more" in reason
    assert engine.stats()["backbones"] == 1 and ask(engine, cifar[0]) == "1"
    write(replace(other, name="c"), small / "c/1")
    shutil.rmtree(small / "a")
    registry.reload()
    registry.reload()  # there is room now
    assert states(registry)["b/1"] == "ready"
