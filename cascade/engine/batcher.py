"""Dynamic batching: images are submitted one by one, decoded in threads, and answered in passes that share a mask.

There is no batching delay. When the engine is free it takes what has gathered meanwhile, so a lone request runs at
once and batches grow with the load. Admission, decoding and deadlines are bounded here and nowhere else.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Self

from cascade import metrics
from cascade.cpus import cpu_count
from cascade.engine.decoders import Decoders, outcome
from cascade.engine.engine import Engine, Source
from cascade.engine.items import Item, trunk
from cascade.engine.results import ItemError, Options, Prediction
from cascade.errors import CascadeError

Answer = Prediction | ItemError
log = logging.getLogger(__name__)

OVERLOADED = ItemError("overloaded", "more images wait than can be answered soon: send it again later")
DEADLINE = ItemError("deadline", "the time that this image may wait is over: send it again later, or allow more")
STOPPING = ItemError("stopping", "the server is stopping: send the request again, to another replica")
FAILED = ItemError("failed", "the pass with this image failed: the server's log says why")
REMEMBERED = 0.2  # weight of the newest pass in the seconds that an image takes
PASS_TIMEOUT = 120.0  # seconds after which a pass counts as hung; it takes one or two


@dataclass(frozen=True, eq=False)
class _Waiting:
    """An image in the queue; times in seconds of the monotonic clock."""

    item: Item
    future: "Future[Answer]"
    since: float
    deadline: float


_Group = deque[_Waiting]


class Batcher:
    """Queues images for an engine: ``with Batcher(engine) as batcher: batcher.submit(jpeg).result()``.

    Each pass takes the largest group of waiting images that share their masks (those of one bundle). Once an image has
    waited longer than ``patience``, the group of the oldest image comes first, so no bundle starves. Other groups fill
    the pass only where they share the plain trunk, since otherwise there is no benefit.

    Args:
        max_batch: images in a pass at most.
        patience: seconds. 0 is arrival order: always the group of the oldest image.
        queue: images that may wait or be decoded at a time; more are refused at once.
        decoders: images that are decoded at a time; each takes up to some hundred MB. None for one per core.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int = 32,
        patience: float = 0.05,
        queue: int = 256,
        decoders: int | None = None,
    ) -> None:
        if min(max_batch, queue) < 1 or patience < 0:
            raise CascadeError("a batcher needs max_batch and queue of 1 at least, and no negative patience")
        self.engine, self.max_batch, self.patience, self.queue = engine, max_batch, patience, queue
        self._decoders = Decoders(decoders or cpu_count(), engine.limits.max_seconds)
        self._groups: dict[Hashable, _Group] = {}
        self._waiting = self._decoding = self._running = 0
        self._seconds = 0.0  # an image takes, lately
        self._begun = 0.0  # when the last pass began, monotonic
        self._closed = False
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

    def submit(self, image: Source, options: Options = Options(), timeout: float | None = None) -> "Future[Answer]":
        """Queue one image to be decoded and answered; returns at once.

        The future always gets an answer: the prediction, or the error of this image (never an exception). An image
        whose ``timeout`` (seconds, from now on) ends before its pass, or whose future is cancelled, costs no pass.
        """
        (future,) = self.submit_all([image], options, timeout)
        return future

    def submit_all(
        self, images: Sequence[Source], options: Options = Options(), timeout: float | None = None
    ) -> "list[Future[Answer]]":
        """``submit`` for several images: all of them get a place in the queue, or none does."""
        since = time.monotonic()
        deadline = math.inf if timeout is None else since + timeout
        with self._changed:
            refusal = self._refusal(len(images))
            if refusal is None:
                self._decoding += len(images)
        if refusal is not None:
            return [_answered(refusal, options.bundle) for _ in images]
        futures: list[Future[Answer]] = []
        for image in images:
            future: Future[Answer] = Future()
            decoded = self._decoders.submit(partial(self._decode, image, options, deadline, future))
            decoded.add_done_callback(partial(self._queue, options, since, deadline, future))
            futures.append(future)
        return futures

    def submit_item(self, item: Item, timeout: float | None = None) -> "Future[Answer]":
        """``submit`` for an item that ``Engine.prepare`` made."""
        since = time.monotonic()
        with self._changed:
            if (refusal := self._refusal(1)) is None:
                deadline = math.inf if timeout is None else since + timeout
                return self._add(_Waiting(item, Future(), since, deadline))
        return _answered(refusal, item.bundle.name)

    async def answers(self, images: Sequence[Source], options: Options, timeout: float) -> list[Answer]:
        """``submit_all`` for an event loop; images without an answer after ``timeout`` seconds get DEADLINE.

        Cancelling it gives up the images that are in no pass yet.
        """
        futures = self.submit_all(images, options, timeout)
        try:
            done = asyncio.gather(*map(asyncio.wrap_future, futures))
            return [*await asyncio.wait_for(done, timeout)]
        except TimeoutError:
            return [future.result() if _has_answer(future) else DEADLINE for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def retry_after(self) -> float:
        """Estimated seconds until every image that waits now is answered."""
        with self._changed:
            return (self._waiting + self._decoding + self._running) * self._seconds

    def close(self, drain: bool = True) -> None:
        """Refuse new images, answer those that wait (without ``drain``: with an error), and end the threads."""
        with self._changed:
            self._closed = True
            gone = [] if drain else self._remove(lambda waiting: True)
            self._changed.notify_all()
        for waiting in gone:
            _refuse(waiting, STOPPING)
        self._thread.join()

    def _refusal(self, images: int) -> ItemError | None:
        if self._closed:
            return STOPPING
        return OVERLOADED if self._waiting + self._decoding + images > self.queue else None

    def _decode(
        self, image: Source, options: Options, deadline: float, future: "Future[Answer]"
    ) -> Item | ItemError | None:
        """In a decoder thread. None where nobody waits for the answer any more."""
        if future.cancelled():
            return None
        if time.monotonic() >= deadline:
            return _counted(DEADLINE, options.bundle)
        with metrics.stage("decode"):
            return self.engine.prepare(image, options)

    def _queue(
        self,
        options: Options,
        since: float,
        deadline: float,
        future: "Future[Answer]",
        decoded: "Future[Item | ItemError | None]",
    ) -> None:
        """Once an image is decoded: it waits for its pass, or has its answer."""
        try:
            item = outcome(decoded, options.bundle)
        except Exception:  # a bad image is an ItemError; this is a fault of ours, or no memory
            log.exception("an image could not be prepared")
            item = _failed(FAILED, options.bundle)
        with self._changed:
            self._decoding -= 1
            self._changed.notify_all()
            if isinstance(item, Item) and not future.cancelled():
                self._add(_Waiting(item, future, since, deadline))
                return
        if not future.set_running_or_notify_cancel():
            metrics.DROPPED.labels("cancelled").inc()
        elif isinstance(item, ItemError):
            future.set_result(item)

    def _add(self, waiting: _Waiting) -> "Future[Answer]":
        key = (trunk(waiting.item), waiting.item.bundle.identity)
        self._groups.setdefault(key, deque()).append(waiting)
        self._waiting += 1
        metrics.QUEUE_DEPTH.inc()
        self._changed.notify_all()
        return waiting.future

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or (self._closed and not self._decoding))
                    if not self._waiting:
                        return
                    late = self._remove(lambda waiting: waiting.deadline <= time.monotonic())
                    batch = self._take()
                    self._begun, self._running = time.monotonic(), len(batch)
                for waiting in late:
                    _refuse(waiting, DEADLINE)
                if batch:
                    self._run(batch)
        finally:  # no future may wait for a thread that has ended
            with self._changed:
                self._closed = True
                gone = self._remove(lambda waiting: True)
            for waiting in gone:
                _refuse(waiting, STOPPING)
            self._decoders.close()

    def _run(self, batch: list[_Waiting]) -> None:
        """One pass; every future has its answer afterwards."""
        answers: list[tuple[_Waiting, Answer]]
        try:
            answers = [*zip(batch, self.engine.run([waiting.item for waiting in batch]), strict=True)]
        except Exception:
            log.exception("a pass over %d images failed", len(batch))
            answers = [(waiting, _failed(FAILED, waiting.item.bundle.name)) for waiting in batch]
        seconds = (time.monotonic() - self._begun) / len(batch)
        with self._changed:
            self._running = 0
            self._seconds += (seconds - self._seconds) * (REMEMBERED if self._seconds else 1)
        for waiting, answer in answers:
            waiting.future.set_result(answer)

    def _take(self) -> list[_Waiting]:
        """What the next pass runs, out of the queue."""
        now = time.monotonic()
        taken: list[_Waiting] = []
        for key in choose(self._groups, self.engine, self.max_batch, now - self.patience):
            group = self._groups.pop(key)
            taken += (group.popleft() for _ in range(min(len(group), self.max_batch - len(taken))))
            if group:
                self._groups[key] = group
        for waiting in taken:
            metrics.QUEUE_SECONDS.observe(now - waiting.since)
        return [waiting for waiting in taken if self._leave(waiting)]

    def _remove(self, which: Callable[[_Waiting], bool]) -> list[_Waiting]:
        """Those of the queue, out of it, less what was cancelled. Their futures are answered outside of the lock."""
        gone: list[_Waiting] = []
        for key in [*self._groups]:
            kept = _Group()
            for waiting in self._groups.pop(key):
                (gone if which(waiting) else kept).append(waiting)
            if kept:
                self._groups[key] = kept
        return [waiting for waiting in gone if self._leave(waiting)]

    def _leave(self, waiting: _Waiting) -> bool:
        """Out of the queue; whether anybody still waits, who from now on cannot cancel."""
        self._waiting -= 1
        metrics.QUEUE_DEPTH.dec()
        wanted = waiting.future.set_running_or_notify_cancel()
        if not wanted:
            metrics.DROPPED.labels("cancelled").inc()
        return wanted


def choose(groups: dict[Hashable, _Group], engine: Engine, max_batch: int, overdue: float) -> list[Hashable]:
    """The groups of the next pass, the first one's images first.

    Args:
        groups: by (trunk, bundle), none empty, each in order of arrival.
        overdue: the group of the oldest image that came by then is first, whatever its size.
    """
    if not groups:
        return []

    def worth(key: Hashable) -> tuple[int, bool, float]:
        group = groups[key]
        return min(len(group), max_batch), _materialized(group[0].item, engine), -group[0].since

    oldest = min(groups, key=lambda key: groups[key][0].since)
    first = oldest if groups[oldest][0].since <= overdue else max(groups, key=worth)
    chosen, left, head = [first], max_batch - len(groups[first]), groups[first][0].item
    if head.bundle.dispatcher.start > 0:
        shared = (key for key in groups if key != first and trunk(groups[key][0].item) == trunk(head))
        for key in sorted(shared, key=worth, reverse=True):
            if len(groups[key]) <= left:  # never a part: a group in two passes is swapped in twice
                chosen.append(key)
                left -= len(groups[key])
    return chosen


def _materialized(item: Item, engine: Engine) -> bool:
    """Whether the pass can start without making a mask's weights."""
    return item.bundle.dispatcher in engine.weight_cache


def _answered(error: ItemError, bundle: str | None) -> "Future[Answer]":
    future: Future[Answer] = Future()
    future.set_result(_counted(error, bundle))
    return future


def _refuse(waiting: _Waiting, why: ItemError) -> None:
    waiting.future.set_result(_counted(why, waiting.item.bundle.name))


def _counted(why: ItemError, bundle: str | None) -> ItemError:
    metrics.DROPPED.labels(why.kind).inc()
    return _failed(why, bundle)


def _failed(why: ItemError, bundle: str | None) -> ItemError:
    metrics.count_answer(bundle, None, why.kind)
    return why


def _has_answer(future: "Future[Answer]") -> bool:
    return future.done() and not future.cancelled()
