"""Deferral, dispatch, bundles on demand and heads without a mask on the path for GPUs; on the device: tests/gpu."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade import Engine, Options, Prediction
from cascade.bundle.format import Bundle, write
from cascade.bundle.schema import MaskCard
from cascade.bundle.store import Store
from cascade.engine import dispatch
from cascade.engine.executors import cuda
from cascade.engine.executors.cuda import CudaExecutor
from cascade.engine.executors.graph import Graph
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.items import AnyItem, Item
from cascade.engine.on_demand import OnDemandRegistry
from cascade.engine.unknown import UnknownImages
from cascade.errors import OutOfMemory
from cascade.model import backbone as backbones
from cascade.model.masks import frozen
from tests.conftest import sheet
from tests.helpers.bundles import handmade, named
from tests.helpers.deferral import two_sizes
from tests.helpers.domains import with_domain
from tests.helpers.on_device import Calls, waits

pytestmark = pytest.mark.slow

STAGE = 2


class Captures:
    """Makes engines take the executor for GPUs, and records where its graphs are captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_a_pass: list[bool] = []
        self.engine: Engine | None = None
        captures = self

        class Recorded(Graph):
            def __init__(
                self, function: Callable[..., Tensor], inputs: Sequence[Tensor], stream: Any = None, pool: Any = None
            ) -> None:
                if captures.engine is not None:
                    captures.in_a_pass.append(captures.engine.resident._lock.locked())
                super().__init__(function, inputs, stream, pool)

        monkeypatch.setattr(cuda, "Graph", Recorded)
        monkeypatch.setattr(
            "cascade.engine.resident.choose",
            lambda backbone, cache, kind, _: (PlainExecutor if kind == "plain" else CudaExecutor)(backbone, cache),
        )

    def engine_of(self, *bundles: Bundle, **options: Any) -> Engine:
        self.engine = Engine(executor="folded", max_batch=4, **options)
        for bundle in bundles:
            self.engine.add(bundle, warm=True)
        return self.engine


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    return Captures(monkeypatch)


@pytest.fixture(scope="module")
def bundles(photos: list[Image.Image]) -> list[Bundle]:
    """Two that images are dispatched to, the first of which has two input sizes and always asks again."""
    deferring = two_sizes(photos[:20], threshold=1.0, name="photos", mask_from=STAGE)
    clothes = sheet("fashion_mnist")
    single = handmade(clothes[:20], name="clothes", mask_from=0, experts=0, size=32, seed=1)
    return [with_domain(deferring, photos[:200], STAGE), with_domain(single, clothes[:200], STAGE)]


def heads_only(images: list[Image.Image]) -> Bundle:
    """What ``cascade train --frozen`` makes: fusion and head over the plain backbone."""
    hand = handmade(images, name="heads", experts=0)
    mask = replace(frozen(backbones.load("test_resnet", "random:0")), name="dispatcher")
    card = MaskCard(name="dispatcher", start=mask.start, weights=0, density=1.0)
    return replace(hand, dispatcher=mask, card=hand.card.model_copy(update={"masks": [card]}))


def answered(engine: Engine, images: Sequence[Image.Image], wishes: Options) -> list[Prediction]:
    good = [answer for answer in engine.predict(images, wishes) if isinstance(answer, Prediction)]
    assert len(good) == len(images)
    return good


@pytest.mark.parametrize("mode", ["fast", "adaptive", "full", "auto", "top2"])
def test_no_pass_captures_anything(
    captures: Captures, bundles: list[Bundle], photos: list[Image.Image], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of either input size, dispatched or named, and of batches that are larger than what was prepared."""
    monkeypatch.setattr(dispatch, "CONTESTED", 1.1)  # top2 asks both bundles
    engine = captures.engine_of(*bundles)
    graphs = engine.executor(bundles[0])._graphs  # type: ignore[attr-defined]
    assert captures.in_a_pass and not any(captures.in_a_pass)
    assert {key[-1] for key in graphs} >= {(3, 32, 32), (3, 64, 64)}
    assert engine.stats()["backbone_bytes"] > sum(graph.bytes for graph in graphs.values()) > 0
    captured = len(captures.in_a_pass)
    named = mode in ("fast", "adaptive", "full")
    wishes = Options("photos", mode=mode) if named else Options(dispatch="top2" if mode == "top2" else "image")
    for count in (1, 3, 4, 7):
        for answer in engine.predict(photos[200 : 200 + count], wishes):
            assert not named or (isinstance(answer, Prediction) and answer.deferral is not None)
    assert len(captures.in_a_pass) == captured


def test_images_that_fit_no_bundle_capture_nothing(
    captures: Captures, bundles: list[Bundle], photos: list[Image.Image]
) -> None:
    engine = captures.engine_of(bundles[1])
    captured = len(captures.in_a_pass)
    answers = engine.predict(photos[200:206], Options("auto", unknown="embedding"))
    assert sum(isinstance(answer, Prediction) and answer.bundle == "" for answer in answers) >= 4
    assert len(captures.in_a_pass) == captured


@pytest.mark.parametrize("among", [None, frozenset({"photos"})])
def test_dispatch_and_a_second_pass_wait_once_each(
    monkeypatch: pytest.MonkeyPatch,
    bundles: list[Bundle],
    photos: list[Image.Image],
    among: frozenset[str] | None,
    tmp_path: Path,
) -> None:
    """Dispatch needs its result to choose masks: two waits in the first pass, and one in the second."""
    Calls(monkeypatch)
    engine = Engine(max_batch=4)
    for bundle in bundles:
        engine.add(bundle)
    items = [engine.prepare(image, Options(among=among)) for image in photos[200:208]]
    batch: list[AnyItem] = [item for item in items if not hasattr(item, "kind")]
    engine.run(batch)
    with UnknownImages(tmp_path, 10, 2**20) as engine.unknown, waits() as first:
        answers = engine.run_pass(batch)
    again: list[AnyItem] = [answer for answer in answers if isinstance(answer, Item)]
    assert len(first) == 2 and len(again) >= 6, first
    with waits() as second:
        engine.run_pass(again)
    assert len(second) == 1, second


def test_pixels_that_a_client_has_normalized_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, bundles: list[Bundle], photos: list[Image.Image]
) -> None:
    """As gRPC and the Open Inference Protocol bring them, beside pictures."""
    Calls(monkeypatch)
    engine = Engine(max_batch=4)
    engine.add(bundles[1])
    pixels = bundles[1].preprocessing.transform()(photos[0])
    items: list[Any] = [engine.prepare(image, Options("clothes")) for image in (pixels, photos[1])]
    engine.run(items)
    with waits() as seen:
        engine.run(items)
    assert len(seen) == 1, seen


def test_heads_without_a_mask(captures: Captures, photos: list[Image.Image]) -> None:
    """The whole backbone is the trunk; whose masks have no weights share every pass."""
    bundle = heads_only(photos[:20])
    engine = captures.engine_of(bundle, named(bundle, "other"))
    captured = len(captures.in_a_pass)
    plain = Engine(executor="plain")
    plain.add(bundle)
    want = answered(plain, photos[:6], Options(embedding=True))
    for name in ("heads", "other"):
        for got, wanted in zip(answered(engine, photos[:6], Options(name, embedding=True)), want, strict=True):
            assert got.embedding is not None and wanted.embedding is not None
            np.testing.assert_allclose(got.embedding, wanted.embedding, rtol=1e-3, atol=1e-4)
    wishes = [Options(("heads", "other")[i % 2], embedding=True) for i in range(4)]
    assert all(isinstance(answer, Prediction) for answer in engine.predict(photos[:4], wishes))
    assert len(captures.in_a_pass) == captured and not any(captures.in_a_pass)


def test_bundles_on_demand(captures: Captures, photos: list[Image.Image], tmp_path: Path) -> None:
    """A cold bundle's graphs are captured outside the lock of passes, and leave with the last one of its shape."""
    hand = handmade(photos[:20], experts=0, mask_from=3)
    for name in ("a", "b"):
        write(named(hand, name), tmp_path / name / "1")
    write(handmade(photos[:20], name="wide", experts=0, mask_from=3, size=32), tmp_path / "wide" / "1")
    probe = captures.engine_of(hand).stats()
    # Room for the backbone with the graphs of one shape, and for one bundle of it.
    room = probe["backbone_bytes"] + probe["packed_bytes"] + 1
    engine = captures.engine_of(memory_bytes=room)
    registry = OnDemandRegistry(engine, Store(tmp_path))
    registry.reload()

    def sizes(name: str) -> set[tuple[int, ...]]:
        answered(engine, photos[:1], Options(name))
        graphs = next(iter(engine.resident.executors.values()))._graphs  # type: ignore[attr-defined]
        return {tuple(key[-1]) for key in graphs if key[-1][0] == 3}

    assert sizes("a") == {(3, 64, 64)}
    captured = len(captures.in_a_pass)
    assert sizes("b") == {(3, 64, 64)}
    assert sizes("wide") == {(3, 32, 32)}
    assert sizes("a") == {(3, 64, 64), (3, 32, 32)}, "how much graphs take is known once they are captured"
    assert sizes("b") == {(3, 64, 64)} and [*engine.names] == ["b"]
    assert len(captures.in_a_pass) > captured and not any(captures.in_a_pass)


def test_a_bundle_whose_graphs_find_no_memory(
    captures: Captures, photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused as too large, which on demand makes room, and leaves nothing behind."""
    hand = handmade(photos[:20], experts=0, mask_from=3)
    engine = captures.engine_of(hand)
    executor = engine.executor(hand)
    before, stats = set(executor._graphs), engine.stats()  # type: ignore[attr-defined]
    run = CudaExecutor._run_each

    def full(*arguments: Any) -> Tensor:
        if len(arguments[1]) == 2:
            raise torch.OutOfMemoryError
        return run(*arguments)

    monkeypatch.setattr(CudaExecutor, "_run_each", full)
    with pytest.raises(OutOfMemory, match="other/1 does not fit into the memory of cpu"):
        engine.add(handmade(photos[:20], name="other", experts=0, mask_from=3, size=32))
    assert set(executor._graphs) == before and engine.stats() == stats  # type: ignore[attr-defined]
