"""Dynamic batching: images are submitted one by one, decoded in threads, and answered in passes that share a mask.

There is no batching delay. When the engine is free it takes what has accumulated, so a lone request runs at once and
batches grow with the load. Admission, decoding and deadlines are bounded here and nowhere else. Backpressure is decided
in ``cascade.engine.admission``, and the order of images in ``cascade.engine.fair_queue``.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Self

from cascade import metrics, tracing
from cascade.cpus import cpu_count
from cascade.engine import deferral, pass_spans, tenant_metrics
from cascade.engine.admission import Admission
from cascade.engine.decoders import Decoders, outcome
from cascade.engine.dispatch import second_round
from cascade.engine.engine import LOADERS, Engine
from cascade.engine.fair_queue import Answer, Promise, Room, Waiting
from cascade.engine.items import AnyItem, ColdItem, Item, OpenItem, PassAnswer, passes
from cascade.engine.pixels import Source
from cascade.engine.priorities import PriorityQueue
from cascade.engine.results import AUTO, ItemError, Options, Prediction
from cascade.engine.statistics import Statistics, Timed
from cascade.engine.tenants import Tenant
from cascade.errors import CascadeError
from cascade.tracing import Trace

log = logging.getLogger(__name__)

DEADLINE = ItemError("deadline", "this image waited too long: send it again later, or allow more time")
STOPPING = ItemError("stopping", "the server is stopping: send the request again, to another replica")
FAILED = ItemError("failed", "the pass with this image failed: see the server's log")
REMEMBERED = 0.2  # weight of the newest pass in the moving average of seconds per image pass
PASS_TIMEOUT = 120.0  # seconds after which a pass counts as hung; it takes one or two


class Batcher:
    """Queues images for an engine: ``with Batcher(engine) as batcher: batcher.submit(jpeg).result()``.

    Each pass takes the largest group of waiting images that share their masks (those of one bundle), among the tenants
    that are due. Once an image has waited longer than ``patience``, the group of the oldest image comes first, so no
    bundle starves. Other groups fill the pass only if they share the plain trunk, since otherwise there is no benefit.
    If a call names no tenant, its bundle is the tenant.

    Args:
        max_batch: most images in a pass.
        patience: seconds. 0 is arrival order: always the group of the oldest image.
        queue: images that may wait or be decoded at a time; more are refused at once.
        time_slice: seconds that a pass of several images may take, estimated from recent passes; it bounds the wait of
            other tenants.
        decoders: images decoded at the same time; each takes up to a few hundred MB. None for one per core.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int = 32,
        patience: float = 0.05,
        queue: int = 256,
        time_slice: float = math.inf,
        decoders: int | None = None,
    ) -> None:
        if min(max_batch, queue) < 1 or min(patience, time_slice) < 0:
            raise CascadeError("a batcher needs max_batch and queue of at least 1, and no negative times")
        self.engine, self.max_batch, self.patience, self.queue = engine, max_batch, patience, queue
        self.time_slice = time_slice
        self._decoders = Decoders(decoders or cpu_count(), engine.limits.max_seconds)
        self._loaders = ThreadPoolExecutor(LOADERS, "cascade-load")
        self.statistics = Statistics()
        self._admission = Admission(queue)
        self._waiting = PriorityQueue()
        self._decoding = 0
        self._running = 0  # image passes
        self._seconds = 0.0  # per image pass, moving average
        self._begun = 0.0  # when the last pass began, monotonic
        self._closed, self._drains = False, True
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="cascade-batcher", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(drain=exc[0] is None)

    @property
    def alive(self) -> bool:
        """Whether it accepts images."""
        return not self._closed

    @property
    def pass_seconds(self) -> float:
        """Seconds since the pass in progress began; 0 between passes."""
        return time.monotonic() - self._begun if self._running else 0.0

    def submit(
        self,
        image: Source,
        options: Options = Options(),
        timeout: float | None = None,
        tenant: Tenant | None = None,
    ) -> Promise:
        """Queue one image to be decoded and answered; returns at once.

        The future always gets an answer: the prediction, or this image's error (never an exception). An image whose
        ``timeout`` (seconds from now) ends before its pass, or whose future is cancelled, costs no pass. If that
        happens between the two passes of a deferred image, the first pass gives the answer.
        """
        (future,) = self.submit_all([image], options, timeout, tenant)
        return future

    def submit_all(
        self,
        images: Sequence[Source],
        options: Options = Options(),
        timeout: float | None = None,
        tenant: Tenant | None = None,
    ) -> list[Promise]:
        """``submit`` for several images: either all of them are queued or none is."""
        since = time.monotonic()
        deadline = math.inf if timeout is None else since + timeout
        with self._changed:
            admitted = self._enter(tenant, options.bundle, len(images), since)
            if isinstance(admitted, Tenant):
                self._decoding += len(images)
        if isinstance(admitted, ItemError):
            return [_answered(admitted, options.bundle, tenant) for _ in images]
        futures: list[Promise] = [Promise() for _ in images]
        self._follow(futures, admitted, since)
        cold = self.engine.is_cold(options.bundle)
        trace = tracing.begin(cold)

        def load() -> None:
            with tracing.span("load", trace, bundle=options.bundle or AUTO):
                self.engine.fetch(options.bundle)

        def decode(*_: object) -> None:
            for image, future in zip(images, futures, strict=True):
                decoded = self._decoders.submit(partial(self._decode, image, options, deadline, future, trace))
                decoded.add_done_callback(partial(self._queue, options, admitted, since, deadline, future, trace))

        # A cold bundle is not loaded in a decoder: its time is bounded, and others should not wait for it.
        if cold:
            self._loaders.submit(load).add_done_callback(decode)
        else:
            decode()
        return futures

    def submit_item(self, item: AnyItem, timeout: float | None = None, tenant: Tenant | None = None) -> Promise:
        """``submit`` for an item from ``Engine.prepare``."""
        since = time.monotonic()
        deadline = math.inf if timeout is None else since + timeout
        future = Promise()
        with self._changed:
            admitted = self._enter(tenant, item.name, 1, since)
            if isinstance(admitted, Tenant):
                self._follow([future], admitted, since)
                self._add(Waiting(item, admitted, future, since, deadline, trace=tracing.begin(cold=False)))
                return future
        return _answered(admitted, item.name, tenant)

    async def answers(
        self, images: Sequence[Source], options: Options, timeout: float, tenant: Tenant | None = None
    ) -> list[Answer]:
        """``submit_all`` for an event loop; images without an answer after ``timeout`` seconds get DEADLINE.

        Images that are dispatched as a set are answered by one bundle. Cancelling drops the images that are not in a
        pass yet.
        """
        end = time.monotonic() + timeout
        answers = await self._answers(images, options, timeout, tenant)
        named, rows = second_round(options, answers)
        left = max(0.0, end - time.monotonic())
        again = await self._answers([images[row] for row in rows], named, left, tenant) if rows else []
        for row, answer in zip(rows, again, strict=True):
            answers[row] = answer
        return answers

    async def _answers(
        self, images: Sequence[Source], options: Options, timeout: float, tenant: Tenant | None
    ) -> list[Answer]:
        futures = self.submit_all(images, options, timeout, tenant)
        try:
            await asyncio.wait([asyncio.wrap_future(future) for future in futures], timeout=timeout)
            return [future.result() if _has_answer(future) else future.first or DEADLINE for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def retry_after(self) -> float:
        """Estimated seconds until all images waiting now are answered."""
        with self._changed:
            return (self._waiting.cost + self._decoding + self._running) * self._seconds

    def close(self, drain: bool = True) -> None:
        """Refuse new images, drain the queue (or answer it with errors, if not ``drain``), and end the threads."""
        with self._changed:
            self._closed, self._drains = True, drain
            gone = [] if drain else self._remove(lambda waiting: True)
            self._changed.notify_all()
        for waiting in gone:
            _refuse(waiting, STOPPING)
        self._thread.join()

    def _enter(self, tenant: Tenant | None, bundle: str | None, images: int, now: float) -> Tenant | ItemError:
        """Reserve places for the images and return their tenant, or the reason for a refusal."""
        if self._closed:
            return STOPPING
        alone = False
        if tenant is None:
            alone = self.engine.only is not None
            name = bundle or self.engine.only
            known = name is not None and name in self.engine.names
            tenant = Tenant(name if known and name else "", keyed=False)  # clients may send any number of names
        return self._admission.enter(tenant, images, now, alone) or tenant

    def _follow(self, futures: Sequence[Promise], tenant: Tenant, since: float) -> None:
        """Count the answers; the last one ends the tenant's request."""
        left = len(futures)

        def done(future: Future[Answer]) -> None:
            nonlocal left
            answer = None if future.cancelled() else future.result()
            tenant_metrics.answered(tenant, time.monotonic() - since, answer)
            with self._changed:
                left -= 1
                if left == 0:
                    self._admission.finish(tenant)

        for future in futures:
            future.add_done_callback(done)

    def _decode(
        self, image: Source, options: Options, deadline: float, future: Promise, trace: Trace | None
    ) -> AnyItem | ItemError | None:
        """Decode in a decoder thread; None if the request has been cancelled."""
        if future.cancelled():
            return None
        if time.monotonic() >= deadline:
            return _counted(DEADLINE, options.bundle)
        with metrics.stage("decode"), tracing.span("decode", trace):
            return self.engine.prepare(image, options)

    def _queue(
        self,
        options: Options,
        tenant: Tenant,
        since: float,
        deadline: float,
        future: Promise,
        trace: Trace | None,
        decoded: "Future[AnyItem | ItemError | None]",
    ) -> None:
        """Queue a decoded image for its pass, or answer it with its error."""
        try:
            item = outcome(decoded, options.bundle)
        except Exception:  # a bad image is an ItemError; this is a bug, or out of memory
            log.exception("an image could not be prepared")
            item = _failed(FAILED, options.bundle)
        with self._changed:
            self._decoding -= 1
            self._changed.notify_all()
            if isinstance(item, Item | OpenItem) and not future.cancelled():
                self._add(Waiting(item, tenant, future, since, deadline, trace=trace))
                return
            self._admission.leave(tenant)
        if not future.set_running_or_notify_cancel():
            metrics.DROPPED.labels("cancelled").inc()
        elif isinstance(item, ItemError):
            future.set_result(item)

    def _add(self, waiting: Waiting) -> None:
        self._waiting.add(waiting)
        metrics.QUEUE_DEPTH.inc()
        self._changed.notify_all()

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting.images or (self._closed and not self._decoding))
                    if not self._waiting.images:
                        return
                self._step()  # its images do not stay in this thread: an evicted bundle lives as long as they do
        finally:  # no future may wait for a dead thread
            with self._changed:
                self._closed = True
                gone = self._remove(lambda waiting: True)
            for waiting in gone:
                _refuse(waiting, STOPPING)
            self._loaders.shutdown(wait=False, cancel_futures=True)
            self._decoders.close()

    def _step(self) -> None:
        with self._changed:
            late = self._remove(_late)
            batch = self._take()
            self._begun, self._running = time.monotonic(), _cost(batch)
        for waiting in late:
            _refuse(waiting, DEADLINE)
        if batch:
            self._run(batch)

    def _run(self, batch: list[Waiting]) -> None:
        """Run one pass; then every future has its answer, or its image waits for a second pass."""
        answers: list[tuple[Waiting, PassAnswer]]
        failed = False
        try:
            with tracing.parts() as parts:
                answers = [*zip(batch, self.engine.run_pass([waiting.item for waiting in batch]), strict=True)]
        except Exception:
            log.exception("a pass over %d images failed", len(batch))
            answers = [(waiting, _failed(FAILED, waiting.item.name)) for waiting in batch]
            failed = True
        timed = [_timed(*pair) for pair in answers]
        self.statistics.count(timed, self._begun, failed)
        pass_spans.record_queue(batch, self._begun)
        passed = [(waiting.trace, each.identity) for waiting, each in zip(batch, timed, strict=True)]
        pass_spans.record_pass(passed, self._begun, time.monotonic(), parts)
        more = [_uncharged(waiting.item, answer) for waiting, answer in answers]
        seconds = (time.monotonic() - self._begun) / (_cost(batch) + sum(more))
        with self._changed:
            self._running = 0
            for waiting, cost in zip(batch, more, strict=True):
                self._waiting.charge(waiting, cost)
            self._seconds += (seconds - self._seconds) * (REMEMBERED if self._seconds else 1)
            following = [(waiting, answer) for waiting, answer in answers if isinstance(answer, Item)]
            for waiting, item in following if self._drains else ():
                waiting.future.first = item.first
                self._admission.reenter(waiting.tenant)
                self._add(replace(waiting, item=item, queued=time.monotonic(), added=time.monotonic()))
        for waiting, item in () if self._drains else following:
            _refuse(replace(waiting, item=item), STOPPING)
        cold: dict[Hashable, list[tuple[Waiting, ColdItem]]] = {}
        for waiting, answer in answers:
            if isinstance(answer, ColdItem):
                cold.setdefault(answer.target.identity, []).append((waiting, answer))
            elif not isinstance(answer, Item):
                waiting.future.set_result(answer)
        for images in cold.values():
            if self._drains:
                self._load(images)
            else:
                for waiting, _ in images:
                    _refuse(waiting, STOPPING)

    def _load(self, images: list[tuple[Waiting, ColdItem]]) -> None:
        """Load the bundle that images were dispatched to, and queue them for it, or answer them with its error."""
        with self._changed:
            self._decoding += len(images)
            for waiting, _ in images:
                self._admission.reenter(waiting.tenant)

        def load() -> list[Item | ItemError]:
            with tracing.span("load", images[0][0].trace, bundle=images[0][1].target.name):
                return [self.engine.warm(cold) for _, cold in images]

        def loaded(job: "Future[list[Item | ItemError]]") -> None:
            try:
                items = job.result()
            except Exception:  # a bug, or the batcher has failed
                log.exception("a bundle could not be loaded")
                items = [_failed(FAILED, None)] * len(images)
            now = time.monotonic()
            for (waiting, _), item in zip(images, items, strict=True):
                with self._changed:
                    self._decoding -= 1
                    self._changed.notify_all()
                    if isinstance(item, Item):
                        self._add(replace(waiting, item=item, queued=now, added=now))
                        continue
                    self._admission.leave(waiting.tenant)
                waiting.future.set_result(item)

        self._loaders.submit(load).add_done_callback(loaded)

    def _take(self) -> list[Waiting]:
        """Take the images of the next pass out of the queue."""
        now = time.monotonic()
        room = Room(self.max_batch, self.time_slice / self._seconds if self._seconds else math.inf)
        taken = self._waiting.take(room, self.engine, now - self.patience)
        for waiting in taken:
            waited = now - waiting.waits_from
            metrics.QUEUE_SECONDS.observe(waited)
            tenant_metrics.waited(waiting.item.name or AUTO, waiting.tenant, waited)
        return [waiting for waiting in taken if self._leave(waiting)]

    def _remove(self, which: Callable[[Waiting], bool]) -> list[Waiting]:
        """Remove matching images from the queue, except cancelled ones; answer their futures outside of the lock."""
        return [waiting for waiting in self._waiting.remove(which) if self._leave(waiting)]

    def _leave(self, waiting: Waiting) -> bool:
        """Count an image out of the queue. Returns False if it was cancelled; from now on it can't be."""
        self._admission.leave(waiting.tenant)
        metrics.QUEUE_DEPTH.dec()
        wanted = waiting.queued is not None or waiting.future.set_running_or_notify_cancel()
        if not wanted:
            metrics.DROPPED.labels("cancelled").inc()
        return wanted


def _timed(waiting: Waiting, answer: PassAnswer) -> Timed:
    """The statistics entry of an image: its bundle by name and version, or empty strings if it fits none.

    An answer that is an item means that another pass follows.
    """
    if isinstance(answer, Item):
        identity = answer.bundle.identity
    elif isinstance(answer, ColdItem):
        identity = answer.target.identity
    elif isinstance(answer, Prediction):
        identity = answer.bundle, answer.version
    else:
        identity = ("", "") if isinstance(waiting.item, OpenItem) else waiting.item.bundle.identity
    ood = answer.ood if isinstance(answer, Prediction) else 0.0
    answered = not isinstance(answer, Item | ColdItem)
    return Timed(identity, waiting.since, waiting.waits_from, answered, ood=ood)


def _late(waiting: Waiting) -> bool:
    """Whether an image gets no further pass: its deadline has passed, or its client has given up.

    Cancelled images are removed at once, so that they neither keep places in the queue nor count as passes received.
    """
    return waiting.future.given_up or waiting.deadline <= time.monotonic()


def _cost(batch: Sequence[Waiting]) -> int:
    return sum(passes(waiting.item) for waiting in batch)


def _uncharged(item: AnyItem, answer: PassAnswer) -> int:
    """Passes of an image beyond its cost when it was taken: its bundle, or the two that were asked, were not known."""
    dispatched = answer.dispatch if isinstance(item, OpenItem) and isinstance(answer, Item | Prediction) else None
    return 0 if dispatched is None else dispatched.passes - 1


def _answered(error: ItemError, bundle: str | None, tenant: Tenant | None) -> Promise:
    future = Promise()
    tenant_metrics.answered(tenant, 0.0, error)
    future.set_result(_counted(error, bundle))
    return future


def _refuse(waiting: Waiting, why: ItemError) -> None:
    """Answer an image that gets no pass with an error, or with the result of its first pass if it had one."""
    first = waiting.item.first
    waiting.future.set_result(_counted(why, waiting.item.name) if first is None else deferral.count(first))


def _counted(why: ItemError, bundle: str | None) -> ItemError:
    metrics.DROPPED.labels(why.kind).inc()
    return _failed(why, bundle)


def _failed(why: ItemError, bundle: str | None) -> ItemError:
    metrics.count_answer(bundle, None, why.kind)
    return why


def _has_answer(future: Promise) -> bool:
    return future.done() and not future.cancelled()
