"""Statistics by bundle and version since the start: images, passes and their times."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cascade.bundle.store import Identity

MOST = 20_000
"""Most versions to remember; the least recently used one is forgotten first (LRU)."""
UNUSUAL = 0.95


@dataclass
class Times:
    """Totals of one version. Seconds are summed over images; ``last`` is in seconds since 1970, 0 for never.

    ``unusual`` counts answers with an out-of-domain score above ``UNUSUAL``: one in twenty without drift.
    """

    images: int = 0
    unusual: int = 0
    passes: int = 0
    failures: int = 0
    seconds: float = 0.0
    failure_seconds: float = 0.0
    queue_seconds: float = 0.0
    pass_seconds: float = 0.0
    last: float = 0.0

    def to_triton(self, name: str, version: str) -> dict[str, Any]:
        """In the format of the Open Inference Protocol's statistics extension: nanoseconds."""

        def spent(count: int, seconds: float) -> dict[str, int]:
            return {"count": count, "ns": round(1e9 * seconds)}

        nothing = spent(0, 0.0)
        return {
            "name": name,
            "version": version,
            "last_inference": round(1000 * self.last),
            "inference_count": self.images,
            "execution_count": self.passes,
            "inference_stats": {
                "success": spent(self.images, self.seconds),
                "fail": spent(self.failures, self.failure_seconds),
                "queue": spent(self.images + self.failures, self.queue_seconds),
                "compute_input": nothing,
                "compute_infer": spent(self.images + self.failures, self.pass_seconds),
                "compute_output": nothing,
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [],
        }


@dataclass(frozen=True)
class Timed:
    """An image of a pass; times in seconds of the monotonic clock.

    Attributes:
        identity: name and version of its bundle.
        since: when it arrived. waits_from: when it began to wait for this pass.
        answered: whether this pass was its last one.
        ood: its out-of-domain score; 0 if there is none.
    """

    identity: Identity
    since: float
    waits_from: float
    answered: bool = True
    ood: float = 0.0


class Statistics:
    """Times by version; thread-safe."""

    def __init__(self) -> None:
        self._times: dict[Identity, Times] = {}
        self._lock = threading.Lock()

    def of(self, name: str, version: str) -> Times:
        """The totals of one version so far; zeros if it has not answered anything."""
        return self._times.get((name, version), Times())

    def count(self, images: Sequence[Timed], begun: float, failed: bool = False) -> None:
        """Count a pass that ends now.

        Args:
            begun: when the pass began, monotonic.
        """
        now = time.monotonic()
        with self._lock:
            for identity in dict.fromkeys(image.identity for image in images):
                times = self._times.pop(identity, None) or Times()
                self._times[identity] = times  # moved to the end: the first one is the least recently used
                members = [image for image in images if image.identity == identity]
                times.passes += 1
                times.queue_seconds += sum(begun - image.waits_from for image in members)
                times.pass_seconds += len(members) * (now - begun)
                answered = [image for image in members if image.answered]
                number, took = len(answered), sum(now - image.since for image in answered)
                if failed:
                    times.failures += number
                    times.failure_seconds += took
                else:
                    times.images += number
                    times.unusual += sum(image.ood > UNUSUAL for image in answered)
                    times.seconds += took
                    times.last = time.time()
            while len(self._times) > MOST:
                del self._times[next(iter(self._times))]
