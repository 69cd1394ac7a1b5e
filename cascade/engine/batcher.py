"""The batcher: many threads submit single images, one thread runs the passes, each over what shares a mask.

Nothing waits for company. When the engine is free it takes what has gathered meanwhile, so a lone request runs at
once and batches grow with the load.
"""

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Self

from cascade import metrics
from cascade.engine.engine import Engine, Source
from cascade.engine.forward import Item, trunk
from cascade.engine.results import ItemError, Options, Prediction
from cascade.errors import CascadeError

Answer = Prediction | ItemError
log = logging.getLogger(__name__)

OVERLOADED = ItemError("overloaded", "more images wait than can be answered soon: send it again later")
DEADLINE = ItemError("deadline", "the time that this image may wait is over: send it again later, or allow more")
STOPPING = ItemError("stopping", "the server is stopping: send the request again, to another replica")
FAILED = ItemError("failed", "the pass with this image failed: the server's log says why")
REMEMBERED = 0.2  # weight of the newest pass in the seconds that an image takes


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

    Each pass takes the largest group of waiting images that share their masks (those of one bundle). Where some
    image has waited longer than ``patience``, the group of the one that has waited longest comes first, so nobody
    starves. Other groups fill the pass up only where they share the plain trunk, for else they would gain nothing.

    Args:
        max_batch: images in a pass at most.
        patience: seconds. 0 is arrival order: always the group of the oldest image.
        queue: images that may wait or be decoded at a time; more are refused at once.
        decoders: images that are decoded at a time, for each takes up to some hundred MB. None for one a core.
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
        self._decoders = threading.BoundedSemaphore(decoders or len(os.sched_getaffinity(0)))
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
        """Whether it takes images."""
        return not self._closed

    @property
    def pass_seconds(self) -> float:
        """How long the pass in progress takes already; 0 where none is."""
        return time.monotonic() - self._begun if self._running else 0.0

    def submit(self, image: Source, options: Options = Options(), timeout: float | None = None) -> "Future[Answer]":
        """Decode the image here, in the calling thread, and queue it.

        The future always gets an answer: the prediction, or the error of this image (never an exception). An image
        whose ``timeout`` (seconds, from now on) ends before its pass, or whose future is cancelled, costs no pass.
        """
        since = time.monotonic()
        with self._changed:
            if refusal := self._refusal():
                return _answered(refusal, options.bundle)
            self._decoding += 1  # it has a place from here on
        item = self._decode(image, options, timeout)
        with self._changed:
            self._decoding -= 1
            self._changed.notify_all()
            if isinstance(item, Item):
                return self._add(item, since, timeout)
        future: Future[Answer] = Future()
        future.set_result(item)
        return future

    def submit_item(self, item: Item, timeout: float | None = None) -> "Future[Answer]":
        """``submit`` for an item that ``Engine.prepare`` made."""
        with self._changed:
            if (refusal := self._refusal()) is None:
                return self._add(item, time.monotonic(), timeout)
        return _answered(refusal, item.bundle.name)

    def retry_after(self) -> float:
        """Seconds until what waits now will have been answered, as far as the last passes tell."""
        with self._changed:
            return (self._waiting + self._decoding + self._running) * self._seconds

    def close(self, drain: bool = True) -> None:
        """Refuse whatever comes, answer what is here (without ``drain``: with an error), and end the thread."""
        with self._changed:
            self._closed = True
            gone = [] if drain else self._remove(lambda waiting: True)
            self._changed.notify_all()
        for waiting in gone:
            _refuse(waiting, STOPPING)
        self._thread.join()

    def _refusal(self) -> ItemError | None:
        if self._closed:
            return STOPPING
        return OVERLOADED if self._waiting + self._decoding >= self.queue else None

    def _decode(self, image: Source, options: Options, timeout: float | None) -> Item | ItemError:
        if timeout is not None and timeout <= 0 or not self._decoders.acquire(timeout=timeout):
            return _counted(DEADLINE, options.bundle)
        try:
            with metrics.stage("decode"):
                return self.engine.prepare(image, options)
        except Exception:  # what is wrong with an image is an ItemError; this is a fault of ours, or no memory
            log.exception("an image could not be prepared")
            metrics.count(options.bundle, None, FAILED.kind)
            return FAILED
        finally:
            self._decoders.release()

    def _add(self, item: Item, since: float, timeout: float | None) -> "Future[Answer]":
        waiting = _Waiting(item, Future(), since, math.inf if timeout is None else since + timeout)
        self._groups.setdefault((trunk(item), item.bundle.identity), deque()).append(waiting)
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
        finally:  # nobody may wait for a thread that is gone
            with self._changed:
                self._closed = True
                gone = self._remove(lambda waiting: True)
            for waiting in gone:
                _refuse(waiting, STOPPING)

    def _run(self, batch: list[_Waiting]) -> None:
        """One pass; every future has its answer afterwards."""
        answers: list[tuple[_Waiting, Answer]]
        try:
            answers = [*zip(batch, self.engine.run([waiting.item for waiting in batch]), strict=True)]
        except Exception:
            log.exception("a pass over %d images failed", len(batch))
            for waiting in batch:
                metrics.count(waiting.item.bundle.name, None, FAILED.kind)
            answers = [(waiting, FAILED) for waiting in batch]
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
            if len(groups[key]) <= left:  # whole ones only: a group in two passes is swapped in twice
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
    metrics.count(bundle, None, why.kind)
    return why
