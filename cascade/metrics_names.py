"""Names as label values, bounded: the busiest by name, the rest as ``other``."""

import os
import threading
from collections.abc import Sequence

from prometheus_client.metrics import MetricWrapperBase

OTHER = "other"
PERIOD = 1000
"""Labels between two updates of the busiest names; counts are halved at each, so that they follow the load."""


class BusiestNames:
    """Label values for any number of names.

    The first names get their own label as they arrive. Later, a name that is twice as busy as one with a label replaces
    it: the replaced name's series end and its further counts go to ``other``, so counters never decrease. If several
    processes share their metrics, series can't end, so the first names keep their labels.

    Args:
        label: the name of the label. metrics: those that have it.
        most: names with their own label.
    """

    def __init__(self, label: str, metrics: Sequence[MetricWrapperBase], most: int) -> None:
        self.label, self.metrics, self.most = label, metrics, most
        self._named: dict[str, float] = {}
        self._others: dict[str, float] = {}
        self._left = PERIOD
        self._lock = threading.Lock()

    def __call__(self, name: str) -> str:
        """Count an image of this name, and return its label value."""
        with self._lock:
            if name not in self._named and len(self._named) < self.most:
                self._named[name] = self._others.pop(name, 0.0)
            counts = self._named if name in self._named else self._others
            counts[name] = counts.get(name, 0.0) + 1
            self._left -= 1
            if self._left == 0:
                self._look()
            return name if name in self._named else OTHER

    def has_own(self, name: str) -> bool:
        """Whether a name has its own label; it gets one if any is left."""
        with self._lock:
            if len(self._named) < self.most:
                self._named.setdefault(name, 0.0)
            return name in self._named

    def _look(self) -> None:
        self._left = PERIOD
        while self._others and not _shared():
            quiet, busy = min(self._named, key=self._named.__getitem__), max(self._others, key=self._others.__getitem__)
            if self._others[busy] <= 2 * self._named[quiet]:
                break
            self._named[busy], self._others[quiet] = self._others.pop(busy), self._named.pop(quiet)
            self._end(quiet)
        self._named = {name: count / 2 for name, count in self._named.items()}
        self._others = {name: count / 2 for name, count in self._others.items() if count >= 1}

    def _end(self, name: str) -> None:
        for metric in self.metrics:
            metric.remove_by_labels({self.label: name})


def _shared() -> bool:
    return bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
