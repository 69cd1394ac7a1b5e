"""Bundles on demand: loaded when a request names them, evicted by LRU, refused ones refused once."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cascade import Engine, ItemError, Options, Prediction
from cascade.bundle.format import Bundle, write
from cascade.bundle.store import Store, StoreError
from cascade.engine.batcher import Batcher
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.on_demand import OnDemandRegistry
from cascade.engine.registry import RETRY
from cascade.engine.stores import load_store
from cascade.errors import CascadeError
from cascade.model.masks import Mask
from tests.helpers.answers import same
from tests.helpers.bundles import handmade, named
from tests.helpers.metrics import now

NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def hand(cifar: list[Image.Image]) -> Bundle:
    return handmade(cifar[:40], experts=0, mask_from=3)


@pytest.fixture
def store(hand: Bundle, tmp_path: Path) -> Path:
    first = write(hand, tmp_path / "store" / "a" / "1")
    for name in NAMES[1:]:
        shutil.copytree(first, tmp_path / "store" / name / "1")
    return tmp_path / "store"


def opened(store: Path, room_for: int | None = None, hand: Bundle | None = None, **options: Any) -> OnDemandRegistry:
    engine = Engine(executor="plain")
    if room_for is not None:
        assert hand is not None
        engine.add(named(hand, "probe"))
        used = engine.stats()
        engine.remove("probe", "1")
        engine = Engine(executor="plain", memory_bytes=used["backbone_bytes"] + room_for * used["packed_bytes"] + 1)
    registry = OnDemandRegistry(engine, Store(store), **options)
    registry.reload()
    return registry


def ask(registry: OnDemandRegistry, name: str, image: Image.Image) -> Prediction | ItemError:
    (answer,) = registry.engine.predict([image], Options(name))
    return answer


def test_a_bundle_is_loaded_when_it_is_named(store: Path, hand: Bundle, cifar: list[Image.Image]) -> None:
    registry = opened(store)
    assert not registry.engine.names and {s.state for s in registry.states()} == {"stored"}
    whole = Engine(executor="plain")
    whole.add(named(hand, "b"))
    (wanted,) = whole.predict(cifar[:1])
    loads, of_b = now("bundle_loads_total"), now("bundle_cold_loads_total", bundle="b")
    for _ in range(2):
        same(ask(registry, "b", cifar[0]), wanted)
    assert [*registry.engine.names] == ["b"] and now("bundle_loads_total") == loads + 1
    assert now("bundle_cold_loads_total", bundle="b") == of_b + 1
    assert [(s.name, s.state) for s in registry.states()] == [(n, "ready" if n == "b" else "stored") for n in NAMES]
    assert now("bundles", state="stored") == 3


def test_a_request_without_a_name_is_not_for_whichever_is_loaded(store: Path, cifar: list[Image.Image]) -> None:
    registry = opened(store)
    ask(registry, "b", cifar[0])
    (answer,) = registry.engine.predict(cifar[:1])
    assert isinstance(answer, ItemError) and answer.kind == "bundle_missing"
    assert registry.engine.only is None


def test_the_least_recently_used_one_makes_room(store: Path, hand: Bundle, cifar: list[Image.Image]) -> None:
    registry = opened(store, 2, hand)
    evictions = now("bundle_evictions_total")
    for name, held in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("d", "cd"), ("a", "ad")):
        assert isinstance(ask(registry, name, cifar[0]), Prediction)
        assert "".join(sorted(registry.engine.names)) == held
    assert now("bundle_evictions_total") == evictions + 3
    registry.reload()
    assert sorted(registry.engine.names) == ["a", "d"], "a look at the store loads nothing else"
    assert {s.name for s in registry.states() if s.state == "stored"} == {"b", "c"}


def test_a_full_memory_costs_a_load_no_second_conversion(
    store: Path, hand: Bundle, cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = opened(store, 1, hand)
    ask(registry, "a", cifar[0])
    packed = []
    pack = PlainExecutor.pack

    def count(executor: PlainExecutor, mask: Mask) -> Mask:
        packed.append(mask.name)
        return pack(executor, mask)

    monkeypatch.setattr(PlainExecutor, "pack", count)
    assert isinstance(ask(registry, "b", cifar[0]), Prediction)
    assert [*registry.engine.names] == ["b"] and packed == ["dispatcher"]


def test_pinned_names_are_loaded_first_and_stay(store: Path, hand: Bundle, cifar: list[Image.Image]) -> None:
    registry = opened(store, 2, hand, pins={"c": "1"})
    assert [*registry.engine.names] == ["c"]
    for name in "abd":
        assert isinstance(ask(registry, name, cifar[0]), Prediction)
    assert sorted(registry.engine.names) == ["c", "d"]


def test_a_bundle_in_use_is_waited_for(store: Path, hand: Bundle, cifar: list[Image.Image]) -> None:
    """Its memory is free only when its last image is answered; meanwhile the next one waits, and is not refused."""
    registry = opened(store, 1, hand)
    item = registry.engine.prepare(cifar[0], Options("a"))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(registry, "b", cifar[0])))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not answers
    (first,) = registry.engine.run([item])  # type: ignore[list-item]
    del item
    thread.join(60)
    assert isinstance(first, Prediction) and isinstance(answers[0], Prediction)


def test_a_bundle_that_leaves_right_after_the_check_has_left(
    store: Path, hand: Bundle, cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = opened(store, 1, hand)
    held = [registry.engine.prepare(cifar[0], Options("a"))]
    fit = registry.engine.resident._fit

    def check(*arguments: Any) -> None:
        try:
            fit(*arguments)
        finally:
            if registry.engine.leaving:
                held.clear()

    monkeypatch.setattr(registry.engine.resident, "_fit", check)
    assert isinstance(ask(registry, "b", cifar[0]), Prediction) and not held


def test_refused_bundles_evict_nobody_and_are_read_once(
    store: Path, hand: Bundle, cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store / "d" / "1" / "masks.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    registry = opened(store, 1, hand)
    ask(registry, "a", cifar[0])
    reads = []
    read = registry.store.read

    def count(name: str, version: str, memory: int | None) -> Any:
        reads.append((name, version))
        return read(name, version, memory)

    monkeypatch.setattr(registry.store, "read", count)
    for name in ("d", "d", "nobody", "d"):
        answer = ask(registry, name, cifar[0])
        assert isinstance(answer, ItemError) and answer.kind == "unknown_bundle"
    registry.reload()
    ask(registry, "d", cifar[0])
    assert [*registry.engine.names] == ["a"] and reads == [("d", "1")]
    (state,) = registry.states("d")
    assert state.state == "refused" and "checksum" in str(state.reason)
    shutil.rmtree(store / "d")
    shutil.copytree(store / "b", store / "d")
    registry.reload()
    assert isinstance(ask(registry, "d", cifar[0]), Prediction)


def test_a_load_that_may_succeed_later_says_when(
    store: Path, cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = opened(store)
    read = registry.store.read

    def fail(*_: object, **__: object) -> Any:
        raise StoreError("the disk is gone")

    monkeypatch.setattr(registry.store, "read", fail)
    answer = ask(registry, "b", cifar[0])
    assert isinstance(answer, ItemError) and answer.kind == "bundle_unavailable"
    assert RETRY - 30 < answer.retry_after <= RETRY and "version 1 is refused: the disk is gone" in answer.message
    monkeypatch.setattr(registry.store, "read", read)
    registry._bad = {i: replace(bad, again=0.0) for i, bad in registry._bad.items()}
    assert isinstance(ask(registry, "b", cifar[0]), Prediction)
    assert ask(registry, "nobody", cifar[0]).kind == "unknown_bundle"  # type: ignore[union-attr]


def test_a_name_is_loaded_once_however_many_ask(store: Path, cifar: list[Image.Image]) -> None:
    registry = opened(store)
    loads = now("bundle_loads_total")
    with Batcher(registry.engine) as batcher:
        futures = [batcher.submit(cifar[i % 8], Options("abc"[i % 3])) for i in range(24)]
        assert all(isinstance(future.result(60), Prediction) for future in futures)
    assert now("bundle_loads_total") == loads + 3


def test_new_versions_and_bundles_are_seen_and_removed_ones_go(store: Path, cifar: list[Image.Image]) -> None:
    registry = opened(store)
    ask(registry, "a", cifar[0])
    ask(registry, "b", cifar[0])
    shutil.copytree(store / "a" / "1", store / "a" / "2")
    shutil.copytree(store / "a" / "1", store / "e" / "1")
    shutil.rmtree(store / "b")
    registry.reload()
    assert registry.engine.bundles == [("a", "1"), ("a", "2")]
    assert isinstance(ask(registry, "e", cifar[0]), Prediction)
    answer = ask(registry, "b", cifar[0])
    assert isinstance(answer, ItemError) and answer.kind == "unknown_bundle"
    registry.unload("a")
    answer = ask(registry, "a", cifar[0])
    assert isinstance(answer, ItemError) and not registry.states("a")
    assert [s.state for s in registry.load("a")] == ["ready", "ready"]


def test_after_a_restart_the_names_in_use_are_loaded_in_the_background(
    store: Path, hand: Bundle, cifar: list[Image.Image], tmp_path: Path
) -> None:
    recent = tmp_path / "cache" / "recent.json"
    registry = opened(store, recent=recent)
    for name in ("d", "b", "c"):
        ask(registry, name, cifar[0])
    with registry.watching(3600):
        pass
    again = opened(store, recent=recent)
    again.prefetch()
    assert sorted(again.engine.names) == ["b", "c", "d"]
    small = opened(store, 2, hand, recent=recent)
    small.prefetch()
    assert "c" in small.engine.names and len(small.engine.names) < 3, "the most recent first, and none for another"
    recent.write_text("{broken")
    broken = opened(store, recent=recent)
    broken.prefetch()
    assert not broken.engine.names


def test_load_store(store: Path, tmp_path: Path) -> None:
    registry = load_store(Engine(executor="plain"), store, cache=tmp_path / "cache", on_demand=True)
    assert isinstance(registry, OnDemandRegistry) and not registry.engine.names
    (tmp_path / "empty").mkdir()
    with pytest.raises(CascadeError, match="no bundle could be loaded"):
        load_store(Engine(executor="plain"), tmp_path / "empty", on_demand=True)
