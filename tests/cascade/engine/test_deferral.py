"""Two input sizes: an unsure image is asked again at the larger one, once, in company, and counted once."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cascade import Engine, ItemError, Options, Prediction
from cascade.bundle.format import Bundle
from cascade.engine import dispatch
from cascade.engine.batcher import Answer, Batcher
from cascade.engine.dispatch_table import MOST_LARGER, DispatchTable, Space, Target
from cascade.engine.executors.selection import Kind
from cascade.engine.items import AnyItem, Item, PassAnswer, passes
from cascade.engine.results import Deferral
from cascade.engine.tenants import Tenant
from tests.conftest import sheet
from tests.helpers.batching import Held
from tests.helpers.bundles import named
from tests.helpers.deferral import two_sizes
from tests.helpers.domains import with_domain
from tests.helpers.metrics import now

pytestmark = pytest.mark.slow

FAST, FULL, BOTH = Options(mode="fast", embedding=True), Options(mode="full"), Options(embedding=True)


def halving(bundle: Bundle, images: Sequence[Image.Image]) -> Bundle:
    """The bundle with a threshold that defers half of the images."""
    assert bundle.card.deferral is not None
    engine = Engine(executor="plain")
    engine.add(bundle)
    middle = float(np.median([a.labels[0].score for a in predicted(engine, images, FAST)]))
    card = bundle.card.deferral.model_copy(update={"threshold": middle})
    return replace(bundle, card=bundle.card.model_copy(update={"deferral": card}))


@pytest.fixture(scope="module")
def pair(cifar: list[Image.Image]) -> Bundle:
    return halving(two_sizes(cifar[:20]), cifar[:40])


@pytest.fixture
def engine(pair: Bundle) -> Engine:
    engine = Engine(executor="plain")
    engine.add(pair)
    return engine


def predicted(engine: Engine, images: Sequence[Image.Image], options: Options | None = None) -> list[Prediction]:
    answers = engine.predict(images, options or Options())
    good = [answer for answer in answers if isinstance(answer, Prediction)]
    assert len(good) == len(answers), answers
    return good


def close(a: Prediction, b: Prediction) -> bool:
    """Equal labels, as far as the batch that an image was in does not matter."""
    names = [label.name for label in a.labels] == [label.name for label in b.labels]
    return names and np.allclose([label.score for label in a.labels], [label.score for label in b.labels], atol=1e-4)


def threshold(bundle: Bundle) -> float:
    assert bundle.card.deferral is not None
    return bundle.card.deferral.threshold


@pytest.mark.parametrize(("plain", "executor"), [(False, "plain"), (True, "plain"), (False, "folded"), (True, "onnx")])
def test_the_larger_size_labels_what_the_smaller_one_is_unsure_of(
    pair: Bundle, cifar: list[Image.Image], plain: bool, executor: Kind
) -> None:
    bundle = two_sizes(cifar[:20], threshold=threshold(pair), plain=plain)
    assert bundle.larger is not None
    alone, engine = Engine(executor="plain"), Engine(executor=executor)
    alone.add(named(bundle.larger, "large"))
    engine.add(bundle)
    large = predicted(alone, cifar[:40])
    fast, full, adaptive = (predicted(engine, cifar[:40], options) for options in (FAST, FULL, BOTH))
    assert all(map(close, full, large))
    unsure = [a.labels[0].score < threshold(pair) for a in fast]
    assert 0 < sum(unsure) < len(unsure)
    for again, small, big, answer in zip(unsure, fast, large, adaptive, strict=True):
        assert close(answer, big if again else small)
        assert answer.deferral == Deferral(64 if again else 32, again) and answer.mode == "adaptive"
        assert answer.masks == (("dispatcher", "larger.dispatcher") if again else ("dispatcher",))
        assert answer.embedding is not None and small.embedding is not None
        assert np.allclose(answer.embedding, small.embedding, atol=1e-4), "embeddings stay comparable"
        assert [n.name for n in answer.neighbors] == [n.name for n in small.neighbors]
        assert answer.ood == pytest.approx(small.ood, abs=1e-3)
    assert {(a.mode, a.deferral, a.masks) for a in full} == {("full", Deferral(64, False), ("larger.dispatcher",))}
    assert {(a.mode, a.deferral) for a in fast} == {("fast", Deferral(32, False))}


def test_an_answer_as_json_and_back(engine: Engine, cifar: list[Image.Image]) -> None:
    (answer,) = predicted(engine, cifar[:1])
    assert Prediction.from_json(answer.to_json()) == answer and answer.deferral is not None
    assert "deferral" not in predicted(engine, cifar[:1], Options(mode="dispatcher"))[0].to_json()


def test_a_bundle_with_one_size_has_no_such_modes(pair: Bundle, cifar: list[Image.Image]) -> None:
    engine = Engine(executor="plain")
    engine.add(replace(pair, larger=None, card=pair.card.model_copy(update={"deferral": None})))
    for mode in ("fast", "adaptive", "full"):
        (error,) = engine.predict(cifar[:1], Options(mode=mode))
        assert isinstance(error, ItemError) and error.kind == "mode_missing" and error.message.endswith("dispatcher")
    assert predicted(engine, cifar[:1])[0].deferral is None


def test_without_labels_nothing_is_asked_again(pair: Bundle, cifar: list[Image.Image]) -> None:
    engine = Engine(executor="plain")
    engine.add(two_sizes(cifar[:20], threshold=1.0))
    assert not any(a.deferral and a.deferral.deferred for a in predicted(engine, cifar[:5], Options(labels=0)))


def test_preprocessed_pixels_have_one_size(pair: Bundle, engine: Engine, cifar: list[Image.Image]) -> None:
    small, large = (part.preprocessing.transform()(cifar[0]) for part in pair.parts)
    (answer,), (full,) = engine.predict([small]), engine.predict([large], FULL)
    assert isinstance(answer, Prediction) and (answer.mode, answer.deferral) == ("fast", Deferral(32, False))
    assert isinstance(full, Prediction) and full.deferral == Deferral(64, False)
    (error,) = engine.predict([small], FULL)
    assert isinstance(error, ItemError) and error.kind == "bad_pixels"


def test_an_image_is_counted_once(pair: Bundle, cifar: list[Image.Image]) -> None:
    engine = Engine(executor="plain")
    engine.add(named(pair, "counted"))
    labels = {"bundle": "counted", "cluster": "0", "outcome": "ok"}
    answers = predicted(engine, cifar[:20])
    deferred = sum(a.deferral is not None and a.deferral.deferred for a in answers)
    assert 0 < deferred < 20
    assert now("requests_total", **labels) == 20 and now("deferred_total", bundle="counted") == deferred
    assert now("ood_score_count", bundle="counted") == 20, "of the first pass, so drift is seen in all images"


def test_cost_follows_the_pixels(engine: Engine, cifar: list[Image.Image]) -> None:
    first, full = engine.prepare(cifar[0]), engine.prepare(cifar[0], FULL)
    assert isinstance(first, Item) and isinstance(full, Item)
    assert (passes(first), passes(full)) == (1, 4)


def test_memory_and_devices_know_both_sizes(pair: Bundle, engine: Engine) -> None:
    assert pair.larger is not None
    assert pair.bytes() == replace(pair, larger=None).bytes() + pair.larger.bytes()
    held = engine.find("hand")
    assert isinstance(held, Bundle) and held.larger is not None
    assert held.larger.dispatcher in engine.weight_cache.owners
    assert pair.to("meta").larger.dispatcher.bits.is_meta  # type: ignore[union-attr]


def test_a_removed_bundle_still_answers_second_passes(engine: Engine, cifar: list[Image.Image]) -> None:
    item = engine.prepare(cifar[0], FULL)
    assert isinstance(item, Item)
    engine.remove("hand", "1")
    (answer,) = engine.run([item])
    assert isinstance(answer, Prediction) and answer.deferral == Deferral(64, False)
    del item
    engine.release()
    assert engine.stats()["backbones"] == 0


# --- after dispatch between bundles


@pytest.mark.parametrize("how", ["image", "top2", "set"])
def test_it_works_after_dispatch(
    pair: Bundle, cifar: list[Image.Image], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "CONTESTED", 1.1)  # with top2, both are asked
    engine, clothes = Engine(executor="plain"), sheet("fashion_mnist")
    late = halving(two_sizes(cifar[:20], mask_from=2), cifar[:30])
    engine.add(named(with_domain(late, cifar[:200]), "photos"))
    engine.add(named(with_domain(two_sizes(clothes[:20], seed=5), clothes[:200]), "clothes"))
    answers = predicted(engine, cifar[:30], Options(dispatch=how))  # type: ignore[arg-type]
    assert any(a.dispatch is not None for a in answers)
    assert {a.deferral.deferred for a in answers if a.deferral} == {True, False}
    for image, answer in zip(cifar, answers, strict=False):
        (same,) = predicted(engine, [image], Options(answer.bundle))
        assert answer.labels[0].name == same.labels[0].name and answer.deferral == same.deferral
    full = predicted(engine, cifar[:3], Options("auto", mode="full"))
    assert {a.deferral for a in full} == {Deferral(64, False)}
    (small,) = engine.predict([pair.preprocessing.transform()(cifar[0])], Options("auto", mode="full"))
    assert isinstance(small, ItemError) and small.kind == "bad_pixels"


def test_an_image_carries_pixels_of_a_few_sizes_only(pair: Bundle) -> None:
    assert pair.larger is not None
    larger, card = pair.larger.preprocessing, pair.card.backbone

    def sized(size: int) -> Target:
        return Target("hand", str(size), card, 0, None, larger, replace(larger, size=size))  # type: ignore[arg-type]

    space = Space("", 0, larger, tuple(map(sized, (64, 96, 128, 160, 192, 224, 224))), None, 1.0)  # type: ignore[arg-type]
    sizes = [preprocessing.size for preprocessing in DispatchTable((space,)).larger]
    assert len(sizes) == MOST_LARGER and sizes[0] == 224


# --- in a queue


@pytest.fixture
def held(cifar: list[Image.Image]) -> Iterator[Held]:
    """All images of ``a`` are asked again."""
    engine, before = Held(), now("queue_depth")
    engine.add(two_sizes(cifar[:20], threshold=1.0, name="a"))
    yield engine
    assert now("queue_depth") == before


def deferral_of(answer: Prediction | ItemError) -> Deferral:
    assert isinstance(answer, Prediction) and answer.deferral is not None, answer
    return answer.deferral


def test_second_passes_of_several_requests_run_together(held: Held, cifar: list[Image.Image]) -> None:
    before = now("bundle_seconds_count", bundle="a")
    with Batcher(held, patience=60) as batcher:
        futures = [batcher.submit(image, Options("a")) for image in cifar[:4]]
        wait(lambda: batcher._decoding == 0)
        held.go.release(10)
        answers = [future.result(30) for future in futures]
        times = batcher.statistics.of("a", "1")
        assert batcher._admission.images == 0
    assert {deferral_of(a) for a in answers} == {Deferral(64, True)}
    assert sum(map(len, held.passes)) == 8 and len(held.passes[-1]) > 1
    assert (times.images, times.passes) == (4, len(held.passes)), "each image once, each pass once"
    assert now("bundle_seconds_count", bundle="a") == before + 4


def between_passes(batcher: Batcher, image: Image.Image, timeout: float | None = None) -> "list[Future[Answer]]":
    """Of an image that has had its first pass, and of two others, in whose pass the engine is held."""
    engine = batcher.engine
    assert isinstance(engine, Held)
    future = batcher.submit(image, Options("a"), timeout)
    assert engine.entered.acquire(timeout=30)
    others = batcher.submit_all([image] * 2, Options("a", mode="fast"), tenant=Tenant("other"))
    wait(lambda: batcher._waiting.images == 2)
    engine.go.release()
    assert engine.entered.acquire(timeout=30)
    assert batcher._admission.images == 1, "it has its place in the queue again"
    return [future, *others]


@pytest.mark.parametrize("how", ["given up", "late", "stopped"])
def test_the_first_answer_stands_where_there_is_no_second_pass(held: Held, cifar: list[Image.Image], how: str) -> None:
    batcher, before = Batcher(held, patience=60), now("requests_total", bundle="a", cluster="0", outcome="ok")
    futures = between_passes(batcher, cifar[0], 2.0 if how == "late" else None)
    if how == "given up":
        assert not futures[0].cancel(), "a pass has begun"
    elif how == "late":
        time.sleep(2.0)
    else:
        threading.Thread(target=batcher.close, args=(False,)).start()
        futures[0].result(30)
    held.go.release(10)
    assert {deferral_of(future.result(30)) for future in futures} == {Deferral(32, False)}
    batcher.close()
    assert list(map(len, held.passes)) == [1, 2]
    assert now("requests_total", bundle="a", cluster="0", outcome="ok") == before + 3


def test_who_waits_no_longer_between_passes_has_the_first_answer(held: Held, cifar: list[Image.Image]) -> None:
    with Batcher(held, patience=60) as batcher, ThreadPoolExecutor() as pool:
        asked = pool.submit(lambda: asyncio.run(batcher.answers([cifar[0]], Options("a"), 2.0)))
        assert held.entered.acquire(timeout=30)
        batcher.submit_all([cifar[0]] * 2, Options("a", mode="fast"), tenant=Tenant("other"))
        wait(lambda: batcher._waiting.images == 2)
        held.go.release()
        assert held.entered.acquire(timeout=30), "in the pass of the two"
        assert [deferral_of(answer) for answer in asked.result(30)] == [Deferral(32, False)]
        held.go.release(10)
    assert list(map(len, held.passes)) == [1, 2]


def test_stopping_in_a_first_pass_saves_the_second(held: Held, cifar: list[Image.Image]) -> None:
    batcher = Batcher(held)
    future = batcher.submit(cifar[0], Options("a"))
    assert held.entered.acquire(timeout=30)
    closing = threading.Thread(target=batcher.close, args=(False,))
    closing.start()
    wait(lambda: not batcher.alive)
    held.go.release(10)
    assert deferral_of(future.result(30)) == Deferral(32, False) and len(held.passes) == 1
    closing.join()


def test_a_second_pass_that_fails_is_an_error(
    held: Held, cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Engine.run_pass

    def fail(engine: Engine, items: Sequence[AnyItem]) -> list[PassAnswer]:
        if items[0].first is not None:
            raise RuntimeError("out of luck")
        return run(engine, items)

    monkeypatch.setattr(Engine, "run_pass", fail)
    held.go.release(10)
    with Batcher(held) as batcher:
        answer = batcher.submit(cifar[0], Options("a")).result(30)
    assert isinstance(answer, ItemError) and answer.kind == "failed"


def test_closing_waits_for_second_passes(held: Held, cifar: list[Image.Image]) -> None:
    batcher = Batcher(held, patience=60)
    future, *_ = between_passes(batcher, cifar[0])
    held.go.release(10)
    batcher.close()
    assert deferral_of(future.result(0)) == Deferral(64, True)


def wait(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to pass")
