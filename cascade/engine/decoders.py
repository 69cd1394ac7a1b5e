"""Decoder threads with a CPU budget per image, so that a few expensive images can't occupy all of them.

A thread in native code can't be stopped. A watchdog abandons one that has exceeded the budget instead: its image gets
an error, its priority drops to the lowest, and another thread replaces it. It ends when its decoder returns.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cascade import metrics
from cascade.engine.items import Item
from cascade.engine.results import ItemError, Options
from cascade.model.decoding import ImageError, too_slow

CHECK_SECONDS = 0.1
"""Seconds between two checks of the decoders' CPU time."""
LOWEST_PRIORITY = 19


@dataclass(eq=False)
class _Job:
    run: Callable[[], Any]
    future: "Future[Any]" = field(default_factory=Future)
    thread: int = 0  # native id
    clock: int = 0  # of the thread's CPU time
    start: float = 0.0  # CPU seconds that the thread had used before


class Decoders:
    """A pool of daemon threads.

    Args:
        threads: jobs that run at the same time. At most as many again may run over budget before threads are no longer
            replaced.
        cpu_seconds: budget of a job.
    """

    def __init__(self, threads: int, cpu_seconds: float) -> None:
        self.threads, self.cpu_seconds = threads, cpu_seconds
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._live = self._given_up = 0  # threads
        self._changed = threading.Condition()
        self._closed = threading.Event()
        with self._changed:
            self._fill()
        threading.Thread(target=self._watch, name="cascade-decode-watch", daemon=True).start()

    def submit(self, run: Callable[[], Any]) -> "Future[Any]":
        """Call ``run`` in one of the threads. The future raises ImageError ("too_complex") over the budget."""
        job = _Job(run)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def map(
        self, prepare: Callable[[Any, Options], Item | ItemError], images: Sequence[Any], options: Sequence[Options]
    ) -> list[Item | ItemError]:
        """Map ``prepare`` over the images, in order; for ``Engine.predict(decode=...)``."""
        jobs = [self.submit(partial(prepare, *job)) for job in zip(images, options, strict=True)]
        return [outcome(job, wish.bundle) for job, wish in zip(jobs, options, strict=True)]

    def close(self) -> None:
        """End idle threads; the others end after their job."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()

    def _fill(self) -> None:
        while self._live < self.threads and self._live + self._given_up < 2 * self.threads:
            self._live += 1
            threading.Thread(target=self._work, name="cascade-decode", daemon=True).start()

    def _work(self) -> None:
        clock = time.pthread_getcpuclockid(threading.get_ident())
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed.is_set())
                if not self._waiting:
                    self._live -= 1
                    return
                job = self._waiting.popleft()
                job.thread, job.clock, job.start = threading.get_native_id(), clock, time.clock_gettime(clock)
                self._running.append(job)
            result, error = None, None
            try:
                result = job.run()
            except Exception as e:
                error = e
            with self._changed:
                if job not in self._running:  # the job was abandoned, and so was this thread
                    self._given_up -= 1
                    self._fill()
                    return
                self._running.remove(job)
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)
            del job, result, error  # else this thread keeps the image's bundle, evicted or not, until its next job

    def _watch(self) -> None:
        while not self._closed.wait(CHECK_SECONDS):
            with self._changed:
                # Jobs leave `_running` under the lock, so the threads of these are alive and their clocks valid.
                late = [j for j in self._running if time.clock_gettime(j.clock) - j.start > self.cpu_seconds]
                for job in late:
                    self._running.remove(job)
                    self._live -= 1
                    self._given_up += 1
                    os.setpriority(os.PRIO_PROCESS, job.thread, LOWEST_PRIORITY)
                self._fill()
            for job in late:
                job.future.set_exception(too_slow(self.cpu_seconds))


def outcome(job: "Future[Any]", bundle: str | None) -> Any:
    """The result of ``Engine.prepare`` in a thread; for an abandoned image its error, which is counted."""
    try:
        return job.result()
    except ImageError as error:
        metrics.count_answer(bundle, None, error.kind)
        return ItemError(error.kind, str(error))
