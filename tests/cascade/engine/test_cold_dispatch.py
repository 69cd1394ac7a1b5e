"""Dispatch to bundles that are not in memory: by their domains, which are read without the rest of the bundle."""

import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade import Engine, ItemError, Options, Prediction
from cascade.bundle.format import Bundle, write
from cascade.bundle.store import Store
from cascade.engine import dispatch, on_demand
from cascade.engine.batcher import Batcher
from cascade.engine.on_demand import OnDemandRegistry
from tests.helpers.bundles import handmade
from tests.helpers.domains import late_and_early

STAGE = 2


@pytest.fixture(scope="module")
def bundles(photos: list[Image.Image], clothes: list[Image.Image]) -> list[Bundle]:
    """Two with a domain, whose masks begin at the stage of dispatch and before, and one without."""
    bare = handmade(photos[:40], name="bare", experts=0)
    return [*late_and_early(photos, clothes, STAGE), bare]


@pytest.fixture
def store(bundles: list[Bundle], tmp_path: Path) -> Path:
    for bundle in bundles:
        write(bundle, tmp_path / "store" / bundle.name / "1")
    return tmp_path / "store"


def opened(store: Path, memory: int | None = None) -> OnDemandRegistry:
    registry = OnDemandRegistry(Engine(executor="plain", memory_bytes=memory), Store(store))
    registry.reload()
    registry.learn()
    return registry


def names(answers: Sequence[Prediction | ItemError]) -> list[str]:
    return [answer.bundle if isinstance(answer, Prediction) else answer.kind for answer in answers]


def test_an_image_finds_a_bundle_that_is_not_in_memory(
    store: Path, bundles: list[Bundle], photos: list[Image.Image], clothes: list[Image.Image]
) -> None:
    registry, whole = opened(store), Engine(executor="plain")
    assert not registry.engine.names
    for bundle in bundles:
        whole.add(bundle)
    images = [photos[205], clothes[205], photos[206], clothes[206]]
    for options in (Options(embedding=True), Options("auto", embedding=True)):
        for found, wanted in zip(registry.engine.predict(images, options), whole.predict(images, options), strict=True):
            assert isinstance(found, Prediction) and isinstance(wanted, Prediction)
            assert found.embedding is not None and wanted.embedding is not None
            np.testing.assert_array_equal(found.embedding, wanted.embedding)
            assert replace(found, embedding=None) == replace(wanted, embedding=None)
    assert sorted(registry.engine.names) == ["clothes", "photos"]


def test_a_full_memory_answers_in_turn(store: Path, photos: list[Image.Image], clothes: list[Image.Image]) -> None:
    """Each load evicts the other bundle, whose images are answered first."""
    used = opened(store)
    used.fetch("photos")
    used.fetch("clothes")
    stats = used.engine.stats()
    assert used.engine.known is not None
    memory = stats["backbone_bytes"] + used.engine.known.bytes + stats["packed_bytes"] - 1
    registry = opened(store, memory)
    images = [image for pair in zip(photos[205:209], clothes[205:209], strict=True) for image in pair]
    with Batcher(registry.engine) as batcher:
        answers = [future.result(60) for future in [batcher.submit(image) for image in images]]
    assert names(answers) == ["photos", "clothes"] * 4
    assert registry.crowded and len(registry.engine.names) == 1


def test_a_batcher_that_stops_at_once_loads_nothing(store: Path, photos: list[Image.Image]) -> None:
    registry = opened(store)
    registry.fetch("bare")  # the backbone
    batcher = Batcher(registry.engine)
    run = registry.engine.run_pass

    def close(items: Any) -> Any:
        batcher._closed, batcher._drains = True, False
        return run(items)

    registry.engine.run_pass = close  # type: ignore[method-assign]
    answer = batcher.submit(photos[205]).result(30)
    batcher.close()
    assert isinstance(answer, ItemError) and answer.kind == "stopping" and [*registry.engine.names] == ["bare"]


def test_domains_are_read_once_and_follow_the_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = opened(store)
    first = registry.engine.known
    assert first is not None and [t.name for _, t in first.columns] == ["clothes", "photos"]
    reads: list[str] = []
    read = registry.store.read_domain

    def count(name: str, version: str) -> Any:
        reads.append(f"{name}/{version}")
        return read(name, version)

    monkeypatch.setattr(registry.store, "read_domain", count)
    registry.learn()
    assert registry.engine.known is first and not reads
    shutil.copytree(store / "photos" / "1", store / "photos" / "2")
    shutil.copytree(store / "clothes" / "1", store / "torn" / "1")
    path = store / "torn" / "1" / "domain.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    shutil.rmtree(store / "clothes")
    registry.reload()
    registry.learn()
    assert sorted(reads) == ["photos/2", "torn/1"]
    assert registry.engine.known is not None
    assert [(t.name, t.version) for _, t in registry.engine.known.columns] == [("photos", "2")]


def test_domains_are_read_after_the_bundles_that_requests_wait_for(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = OnDemandRegistry(Engine(executor="plain"), Store(store))
    registry.reload()
    events: list[str] = []

    class Stop(threading.Event):
        """Of the thread that reads domains; ``wait`` is called where it leaves the time to others."""

        def wait(self, timeout: float | None = None) -> bool:
            pauses.set()
            return super().wait(timeout)

    def noted(what: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            events.append(what)
            return do(*arguments, **options)

        return call

    pauses, learner = threading.Event(), threading.Thread(target=lambda: registry.learn(Stop()))
    read = registry.store.read

    def slow(*arguments: Any, **options: Any) -> Any:
        learner.start()
        assert pauses.wait(60)
        return noted("bundle", read)(*arguments, **options)

    monkeypatch.setattr(registry.store, "read", slow)
    monkeypatch.setattr(registry.store, "read_domain", noted("domain", registry.store.read_domain))
    registry.fetch("clothes")
    learner.join()
    assert events[0] == "bundle" and events.count("domain") == 3


def test_domains_have_a_bound(store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    registry = opened(store)
    assert registry.engine.known is not None
    (_, first), _ = registry.engine.known.columns
    monkeypatch.setattr(on_demand, "DOMAINS", first.bytes() + 1)
    with caplog.at_level(logging.WARNING):
        bounded = opened(store)
    assert bounded.engine.known is not None
    assert [t.name for _, t in bounded.engine.known.columns] == ["clothes"]
    assert "the domains of 1 bundles don't fit into memory" in caplog.text


def test_a_target_that_cannot_be_loaded_is_no_target_afterwards(
    store: Path, photos: list[Image.Image], clothes: list[Image.Image]
) -> None:
    path = store / "photos" / "1" / "masks.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # its domain is whole
    registry = opened(store)
    registry.fetch("clothes")
    (answer,) = registry.engine.predict(photos[205:206])
    assert isinstance(answer, ItemError) and answer.kind == "bundle_unavailable" and answer.retry_after > 0
    with Batcher(registry.engine) as batcher:
        assert names([batcher.submit(photos[205]).result(30)]) == ["bundle_unavailable"]
    registry.learn()
    assert names(registry.engine.predict([photos[205], clothes[205]])) == ["unknown_domain", "clothes"]


def test_only_the_likeliest_of_two_is_loaded(
    store: Path, photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "CONTESTED", 1.1)  # every image is
    registry = opened(store)
    assert names(registry.engine.predict([photos[205]], Options("auto"))) == ["photos"]
    assert [*registry.engine.names] == ["photos"] or sorted(registry.engine.names) == ["clothes", "photos"]


def test_a_backbone_that_left_before_the_pass(store: Path, photos: list[Image.Image]) -> None:
    registry = opened(store)
    registry.fetch("clothes")
    item = registry.engine.prepare(photos[205])
    registry.unload("clothes")
    (answer,) = registry.engine.run([item])  # type: ignore[list-item]
    assert isinstance(answer, ItemError) and answer.kind == "bundle_unavailable"
