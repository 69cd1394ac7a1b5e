"""The batcher over a real engine; where the order of passes is tested, the engine waits for a sign before each."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from cascade import Engine, ItemError, Options, Prediction
from cascade.bundle.format import Bundle
from cascade.engine.batcher import Batcher
from cascade.engine.fair_queue import Answer
from cascade.engine.items import AnyItem, Item, PassAnswer
from cascade.engine.tenants import Tenant
from cascade.errors import CascadeError
from cascade.model.decoding import LIMITS
from tests.helpers.batching import Held, busy
from tests.helpers.bundles import handmade, named
from tests.helpers.metrics import now


@pytest.fixture(scope="module")
def whole(cifar: list[Image.Image]) -> Bundle:
    """Masks everything: it has no trunk to share."""
    return handmade(cifar[:20], experts=0, size=32)


@pytest.fixture(scope="module")
def late(cifar: list[Image.Image]) -> Bundle:
    """Masks the last stages only."""
    return handmade(cifar[:20], experts=2, mask_from=3, size=32)


@pytest.fixture
def held(whole: Bundle) -> Iterator[Held]:
    engine = Held()
    for name in ("a", "b", "c"):
        engine.add(named(whole, name))
    before = now("queue_depth")
    yield engine
    assert now("queue_depth") == before, "whatever came has left the queue"


def queue(batcher: Batcher, image: Image.Image, bundles: str, tenant: Tenant | None = None) -> "list[Future[Answer]]":
    """One image for each letter, in this order: they are prepared before, so no decoder can change it."""
    items = [batcher.engine.prepare(image, Options(bundle)) for bundle in bundles]
    return [batcher.submit_item(item, tenant=tenant) for item in items if isinstance(item, Item)]


def order(engine: Held, batcher: Batcher, futures: "Sequence[Future[Answer]]") -> list[str]:
    """Let all passes go; the bundles of each but the first, joined."""
    engine.go.release(100)
    assert all(isinstance(f.result(30), Prediction) for f in futures)
    return ["".join(names) for names in engine.passes[1:]]


def kind(future: "Future[Answer]") -> str:
    answer = future.result(30)
    assert isinstance(answer, ItemError) and "\n" not in answer.message
    return answer.kind


# --- which images share a pass, and which pass is first


def test_largest_group_first(held: Held, cifar: list[Image.Image]) -> None:
    with Batcher(held, patience=60) as batcher:
        busy(batcher, cifar[0])
        assert order(held, batcher, queue(batcher, cifar[0], "abbabb")) == ["bbbb", "aa"]


def test_no_company_where_nothing_is_shared(held: Held, cifar: list[Image.Image]) -> None:
    with Batcher(held, patience=60) as batcher:
        busy(batcher, cifar[0])
        assert order(held, batcher, queue(batcher, cifar[0], "abb")) == ["bb", "a"]


def test_who_waited_longer_than_patience_is_first(held: Held, cifar: list[Image.Image]) -> None:
    with Batcher(held, patience=0.05) as batcher:
        busy(batcher, cifar[0])
        futures = queue(batcher, cifar[0], "a")
        time.sleep(0.1)
        assert order(held, batcher, futures + queue(batcher, cifar[0], "bbb"))[0] == "a"


def test_no_patience_is_arrival_order(held: Held, cifar: list[Image.Image]) -> None:
    with Batcher(held, patience=0) as batcher:
        busy(batcher, cifar[0])
        assert order(held, batcher, queue(batcher, cifar[0], "abbbca")) == ["aa", "bbb", "c"]


def test_no_more_than_max_batch(held: Held, cifar: list[Image.Image]) -> None:
    with Batcher(held, max_batch=2, patience=60) as batcher:
        busy(batcher, cifar[0])
        assert order(held, batcher, queue(batcher, cifar[0], "abababa")) == ["aa", "bb", "b", "aa"]


def test_among_equals_the_materialized_one_first(held: Held, cifar: list[Image.Image]) -> None:
    with Batcher(held, patience=60) as batcher:
        held.go.release()
        busy(batcher, cifar[0], "b").result(30)  # its mask is there from now on
        busy(batcher, cifar[0])
        futures = queue(batcher, cifar[0], "aabb", Tenant("one"))
        assert order(held, batcher, futures) == ["c", "bb", "aa"]


def test_groups_that_share_the_trunk_fill_a_pass(whole: Bundle, late: Bundle, cifar: list[Image.Image]) -> None:
    engine = Held()
    for bundle in (named(late, "a"), named(late, "b"), named(late, "c"), named(whole, "w")):
        engine.add(bundle)
    with Batcher(engine, max_batch=4, patience=60) as batcher:
        busy(batcher, cifar[0])
        futures = queue(batcher, cifar[0], "aabbbwwc")
        assert order(engine, batcher, futures) == ["bbbc", "aa", "ww"], "aa whole or not at all; w has no trunk"


def test_answers_are_the_engines(late: Bundle, cifar: list[Image.Image]) -> None:
    engine = Engine()
    names = ("a", "b", "c")
    for name in names:
        engine.add(named(late, name))
    wishes = [Options(names[i % 3], mode="conditional" if i % 2 else None) for i in range(24)]
    want = engine.predict(cifar[:24], wishes)
    before = now("queue_seconds_count")
    with Batcher(engine, max_batch=8) as batcher, ThreadPoolExecutor(8) as pool:
        got = [f.result(30) for f in pool.map(batcher.submit, cifar[:24], wishes)]
        items = [engine.prepare(image, wish) for image, wish in zip(cifar, wishes, strict=False)]
        prepared = [batcher.submit_item(item).result(30) for item in items if isinstance(item, Item)]
    assert len(prepared) == 24
    for answers in (got, prepared):
        for a, b in zip(answers, want, strict=True):
            assert isinstance(a, Prediction) and isinstance(b, Prediction)
            assert (a.bundle, a.mode, a.cluster, a.masks) == (b.bundle, b.mode, b.cluster, b.masks)
            assert a.confidence == pytest.approx(b.confidence, abs=1e-3)
    assert now("queue_seconds_count") == before + 48


# --- who gets no pass


def test_bad_image_is_its_own_error(held: Held) -> None:
    with Batcher(held) as batcher:
        assert kind(batcher.submit(b"no image", Options("a"), timeout=0)) == "deadline", "not even decoded"
        assert kind(batcher.submit(b"no image", Options("a"))) == "not_an_image"
        assert kind(batcher.submit(b"no image", Options("z"))) == "unknown_bundle"
    assert not held.passes


def test_full_queue_answers_at_once(held: Held, cifar: list[Image.Image]) -> None:
    refused, failed = now("dropped_total", why="overloaded"), now("requests_total", **counted("a", "overloaded"))
    with Batcher(held, queue=3) as batcher:
        first = busy(batcher, cifar[0])
        futures = queue(batcher, cifar[0], "aab")
        assert now("queue_depth") == 3
        assert kind(batcher.submit(cifar[0], Options("a"))) == "overloaded"
        item = held.prepare(cifar[0], Options("a"))
        assert isinstance(item, Item)
        assert kind(batcher.submit_item(item)) == "overloaded"
        assert batcher.retry_after() == 0, "nothing was measured yet"
        wait_for(lambda: batcher.pass_seconds > 0.02)
        held.go.release()
        first.result(30)
        assert held.entered.acquire(timeout=30)
        assert batcher.retry_after() > 0
        order(held, batcher, futures)
        wait_for(lambda: batcher.pass_seconds == 0)
    assert now("dropped_total", why="overloaded") == refused + 2
    assert now("requests_total", **counted("a", "overloaded")) == failed + 2


def counted(bundle: str, outcome: str) -> dict[str, str]:
    return {"bundle": bundle, "cluster": "none", "outcome": outcome}


def test_those_in_decoding_have_a_place(held: Held, cifar: list[Image.Image]) -> None:
    """Or else a crowd of decoders would hold any amount of pixels before the queue says that it is full."""
    prepare, started, go = held.prepare, threading.Semaphore(0), threading.Event()

    def slow(*args: object) -> AnyItem | ItemError:
        started.release()
        assert go.wait(30)
        return prepare(*args)  # type: ignore[arg-type]

    held.prepare = slow  # type: ignore[method-assign,assignment]
    held.go.release(100)
    with Batcher(held, queue=3, decoders=2) as batcher:
        waiting = [batcher.submit(cifar[0], Options("a")) for _ in range(2)]
        for _ in range(2):
            assert started.acquire(timeout=30)
        late = batcher.submit(cifar[0], Options("b"), timeout=0.01)
        assert not started.acquire(timeout=0.1), "a third one would need memory"
        assert kind(batcher.submit(cifar[0], Options("a"))) == "overloaded"
        go.set()
        assert all(isinstance(f.result(30), Prediction) for f in waiting)
        assert kind(late) == "deadline", "no decoder was free in time"


def test_an_image_that_is_cancelled_in_decoding_takes_no_pass(held: Held, cifar: list[Image.Image]) -> None:
    prepare, started, go = held.prepare, threading.Event(), threading.Event()

    def slow(*args: object) -> AnyItem | ItemError:
        started.set()
        assert go.wait(30)
        return prepare(*args)  # type: ignore[arg-type]

    held.prepare = slow  # type: ignore[method-assign,assignment]
    before = now("dropped_total", why="cancelled")
    with Batcher(held, decoders=1) as batcher:
        decoding, waiting = (batcher.submit(cifar[0], Options("a")) for _ in range(2))
        assert started.wait(30)
        assert decoding.cancel() and waiting.cancel()
        go.set()
    assert held.passes == []
    assert now("dropped_total", why="cancelled") == before + 2


def test_costly_images_do_not_keep_others_from_being_decoded(held: Held, cifar: list[Image.Image]) -> None:
    prepare, stop = held.prepare, threading.Event()

    def spin(image: object, *args: object) -> AnyItem | ItemError:
        while isinstance(image, bytes) and not stop.is_set():
            pass
        return prepare(image, *args)  # type: ignore[arg-type]

    held.prepare = spin  # type: ignore[method-assign,assignment]
    held.go.release(10)
    held.limits = replace(LIMITS, max_seconds=0.05)
    with Batcher(held, decoders=2) as batcher:
        costly = [batcher.submit(b"", Options("a")) for _ in range(2)]
        assert isinstance(batcher.submit(cifar[0], Options("a")).result(30), Prediction)
        assert [kind(future) for future in costly] == ["too_complex"] * 2
        stop.set()


def test_the_images_of_one_request_get_a_place_together(held: Held, cifar: list[Image.Image]) -> None:
    with Batcher(held, queue=4) as batcher:
        busy(batcher, cifar[0])
        kept = batcher.submit_all(cifar[:2], Options("a"))
        assert [kind(f) for f in batcher.submit_all(cifar[:2], Options("a"))] == ["over_queue"] * 2, (
            "half is for others"
        )
        assert [kind(f) for f in batcher.submit_all(cifar[:3], Options("b"))] == ["overloaded"] * 3
        kept += batcher.submit_all(cifar[:2], Options("b"))
        order(held, batcher, kept)


def test_answers_in_an_event_loop(held: Held, cifar: list[Image.Image]) -> None:
    async def ask(timeout: float) -> list[Answer]:
        return await batcher.answers(cifar[:2], Options("a"), timeout)

    with Batcher(held) as batcher:
        assert {a.kind for a in asyncio.run(ask(0.2)) if isinstance(a, ItemError)} == {"deadline"}
        held.go.release(100)
        assert all(isinstance(a, Prediction) for a in asyncio.run(ask(30)))


def test_answers_that_are_given_up_leave_no_error(
    held: Held, cifar: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio logs an exception that nobody takes from a future: an error for every client that hangs up."""

    async def give_up() -> None:
        task = asyncio.create_task(batcher.answers(cifar[:2], Options("a"), 30))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    with Batcher(held) as batcher:
        busy(batcher, cifar[0])
        asyncio.run(give_up())
        gc.collect()
        held.go.release(10)
    assert held.passes == [["c"]] and not caplog.records


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_deadline_and_cancelled_cost_no_pass(held: Held, cifar: list[Image.Image]) -> None:
    before = {why: now("dropped_total", why=why) for why in ("deadline", "cancelled")}
    with Batcher(held) as batcher:
        busy(batcher, cifar[0])
        late = batcher.submit(cifar[0], Options("a"), timeout=0.01)
        given_up = batcher.submit(cifar[0], Options("a"))
        kept = batcher.submit(cifar[0], Options("b"), timeout=60)
        assert given_up.cancel()
        time.sleep(0.02)
        assert order(held, batcher, [kept]) == ["b"]
        assert kind(late) == "deadline"
    for why, count in before.items():
        assert now("dropped_total", why=why) == count + 1


# --- tenants


def test_a_burst_leaves_room_for_others(held: Held, cifar: list[Image.Image]) -> None:
    loud, quiet = Tenant("loud"), Tenant("quiet")
    with Batcher(held, queue=8) as batcher:
        first = busy(batcher, cifar[0])
        burst = [batcher.submit(cifar[0], Options("a"), tenant=loud) for _ in range(20)]
        answered = [f for f in burst if f.done()]
        assert [kind(f) for f in answered] == ["over_queue"] * 16
        others = [batcher.submit(cifar[0], Options("b"), tenant=quiet) for _ in range(2)]
        order(held, batcher, [first, *others, *(f for f in burst if f not in answered)])


def test_a_cancelled_burst_leaves_the_queue_and_costs_no_turn(held: Held, cifar: list[Image.Image]) -> None:
    loud, quiet = Tenant("loud"), Tenant("quiet")
    with Batcher(held, queue=16, max_batch=1, patience=0) as batcher:
        first = busy(batcher, cifar[0])
        burst = [batcher.submit(cifar[0], Options("a"), tenant=loud) for _ in range(8)]
        wait_for(lambda: batcher._waiting.images == 8)
        others = [batcher.submit(cifar[0], Options("b"), tenant=quiet) for _ in range(4)]
        assert all(future.cancel() for future in burst)
        held.go.release()
        assert held.entered.acquire(timeout=30)  # the next pass has begun
        again = [batcher.submit(cifar[0], Options("a"), tenant=loud) for _ in range(4)]
        assert not any(future.done() for future in again), "its places are free again"
        wait_for(lambda: batcher._waiting.images == 7)
        passes = order(held, batcher, [first, *others, *again])
        assert passes.index("a") <= 2, "images that were not answered are not charged"


def test_a_lone_bundle_has_the_whole_queue(whole: Bundle, cifar: list[Image.Image]) -> None:
    engine = Held()
    engine.add(named(whole, "c"))
    with Batcher(engine, queue=4) as batcher:
        first = busy(batcher, cifar[0])
        kept = [batcher.submit(cifar[0], Options(name)) for name in ("c", None, "c", None)]
        assert kind(batcher.submit(cifar[0], Options())) == "overloaded"
        order(engine, batcher, [first, *kept])


def test_requests_at_a_time(held: Held, cifar: list[Image.Image]) -> None:
    tenant = Tenant("one", concurrency=1)
    with Batcher(held) as batcher:
        first = batcher.submit_all(cifar[:2], Options("a"), tenant=tenant)
        assert kind(batcher.submit(cifar[0], Options("a"), tenant=tenant)) == "over_concurrency"
        order(held, batcher, first)
        again = batcher.submit(b"no image", Options("a"), tenant=tenant)
        assert kind(again) == "not_an_image"
        wait_for(lambda: batcher._admission.images == 0)
        assert kind(batcher.submit(b"no image", Options("a"), tenant=tenant)) == "not_an_image"


def test_a_pass_ends_with_its_time_slice(held: Held, cifar: list[Image.Image]) -> None:
    with Batcher(held, time_slice=1e-6, patience=60) as batcher:
        held.go.release()
        busy(batcher, cifar[0]).result(30)  # now it knows how long an image takes
        busy(batcher, cifar[0])
        assert order(held, batcher, queue(batcher, cifar[0], "aab")) == ["c", "a", "b", "a"]


def test_batch_work_comes_last_and_still_comes(held: Held, cifar: list[Image.Image]) -> None:
    item = held.prepare(cifar[0], Options("a"))
    later = held.prepare(cifar[0], Options("b", priority="batch"))
    assert isinstance(item, Item) and isinstance(later, Item)
    with Batcher(held, max_batch=1) as batcher:
        busy(batcher, cifar[0])
        futures = [batcher.submit_item(later) for _ in range(2)]
        futures += [batcher.submit_item(item) for _ in range(20)]
        assert "".join(order(held, batcher, futures)) == "a" * 9 + "b" + "a" * 9 + "b" + "aa"


def test_what_a_customer_notices_is_counted(held: Held, cifar: list[Image.Image]) -> None:
    tenant, name = Tenant("acme", rate=2), {"tenant": "acme"}
    before = now("bundle_seconds_count", bundle="a"), now("bundle_queue_seconds_count", bundle="a")
    missed = now("bundle_masks_total", bundle="a", result="miss")
    held.go.release(10)
    with Batcher(held) as batcher:
        assert isinstance(batcher.submit(cifar[0], Options("a"), tenant=tenant).result(30), Prediction)
        assert kind(batcher.submit(b"no image", Options("a"), tenant=tenant)) == "not_an_image"
        assert kind(batcher.submit(b"", Options("a"), tenant=tenant)) == "over_rate"
        assert isinstance(batcher.submit(cifar[0], Options("a")).result(30), Prediction), "nobody's but the bundle's"
        wait_for(lambda: now("bundle_seconds_count", bundle="a") == before[0] + 2)
    for outcome in ("ok", "not_an_image", "over_rate"):
        assert now("tenant_images_total", outcome=outcome, **name) == 1
    assert now("tenant_seconds_count", **name) == now("tenant_queue_seconds_count", **name) == 1
    assert now("bundle_queue_seconds_count", bundle="a") == before[1] + 2
    assert now("bundle_masks_total", bundle="a", result="miss") == missed + 1
    assert now("tenant_images_total", tenant="a", outcome="ok") == 0


# --- faults and the end


def test_a_failing_pass_fails_its_own_images(late: Bundle, cifar: list[Image.Image]) -> None:
    class Failing(Engine):
        def run_pass(self, items: Sequence[AnyItem]) -> list[PassAnswer]:
            if items[0].options.labels == 0:
                raise RuntimeError("out of luck")
            return super().run_pass(items)

    engine = Failing()
    engine.add(named(late, "late"))
    before = now("requests_total", **counted("late", "failed"))
    with Batcher(engine) as batcher:
        assert kind(batcher.submit(cifar[0], Options("late", labels=0))) == "failed"
        assert isinstance(batcher.submit(cifar[0], Options("late")).result(30), Prediction)
    assert now("requests_total", **counted("late", "failed")) == before + 1


def test_no_memory_for_an_image_is_its_own_error(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*args: object) -> AnyItem | ItemError:
        raise MemoryError

    monkeypatch.setattr(held, "prepare", prepare)
    with Batcher(held) as batcher:
        assert kind(batcher.submit(b"", Options("a"))) == "failed"


def test_close_answers_what_waits(held: Held, cifar: list[Image.Image]) -> None:
    batcher = Batcher(held)
    futures = [busy(batcher, cifar[0]), *queue(batcher, cifar[0], "ab")]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    wait_for(lambda: batcher._closed)
    assert kind(batcher.submit(cifar[0], Options("a"))) == "stopping"
    order(held, batcher, futures)
    closing.join(30)
    assert not closing.is_alive() and not batcher._thread.is_alive()
    batcher.close()  # once more does no harm


def test_close_without_drain_refuses_what_waits(held: Held, cifar: list[Image.Image]) -> None:
    batcher = Batcher(held)
    first, (second,) = busy(batcher, cifar[0]), queue(batcher, cifar[0], "a")
    closing = threading.Thread(target=batcher.close, args=(False,))
    closing.start()
    assert kind(second) == "stopping"
    held.go.release()
    assert isinstance(first.result(30), Prediction), "the pass in progress is finished"
    closing.join(30)
    assert held.passes == [["c"]]


def test_a_scheduler_that_dies_leaves_nobody_waiting(
    held: Held, cifar: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    batcher = Batcher(held)
    busy(batcher, cifar[0])
    (second,) = queue(batcher, cifar[0], "a")
    monkeypatch.setattr(batcher._waiting, "take", None)
    held.go.release()
    assert kind(second) == "stopping"
    batcher._thread.join(30)
    assert len(seen) == 1
    assert kind(batcher.submit(cifar[0], Options("a"))) == "stopping"


def test_load_from_many_threads(late: Bundle, cifar: list[Image.Image]) -> None:
    """More than the queue holds, some of it given up: each future has an answer, and the queue is empty at the end."""
    engine = Engine()
    for name in ("a", "b"):
        engine.add(named(late, name))
    files = []
    for image in cifar[:10]:
        image.save(file := BytesIO(), "png")
        files.append(file.getvalue())
    depth = now("queue_depth")

    def client(i: int) -> str:
        future = batcher.submit(files[i % 10], Options("ab"[i % 2]), timeout=0.01 if i % 7 == 0 else 30)
        if i % 5 == 0 and future.cancel():
            return "cancelled"
        answer = future.result(30)
        return answer.kind if isinstance(answer, ItemError) else answer.bundle

    with Batcher(engine, max_batch=4, queue=8) as batcher, ThreadPoolExecutor(16) as pool:
        found = [*pool.map(client, range(300))]
    assert set(found) <= {"a", "b", "overloaded", "over_queue", "cancelled", "deadline"} and {"a", "b"} <= set(found)
    assert now("queue_depth") == depth


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"queue": 0}, {"patience": -1}, {"time_slice": -1}])
def test_settings_that_cannot_work(held: Held, wrong: dict[str, int]) -> None:
    with pytest.raises(CascadeError, match="a batcher needs"):
        Batcher(held, **wrong)
