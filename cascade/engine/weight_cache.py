"""An LRU cache of materialized weights by mask, bounded in bytes, with one prefetch in flight."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from cascade import metrics
from cascade.errors import CascadeError

Make = Callable[[Tensor | None], Tensor]


class WeightCache:
    """Materialized weights by mask. One thread calls ``get``; ``prefetch`` makes the next weights in another thread.

    Attributes:
        budget: most bytes at any time.
        used: bytes now, including those in flight.
        hits, misses, evictions: counters since the start.
        owners: names of the masks' bundles, for the metrics.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self.hits = self.misses = self.evictions = 0
        self.owners: dict[Hashable, str] = {}
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._pinned: Hashable = None  # the last one returned is in use
        self._in_flight: tuple[Hashable, int, Future[Tensor]] | None = None
        self._thread = ThreadPoolExecutor(1, "cascade-prefetch")  # starts with its first job

    def __contains__(self, key: Hashable) -> bool:
        in_flight = self._in_flight  # read once: other threads ask, too
        return key in self._entries or (in_flight is not None and in_flight[0] == key)

    def get(self, key: Hashable, size: int, make: Make) -> Tensor:
        """Get the weights of mask ``key``, made by ``make`` on a miss; they are pinned until the next call.

        Args:
            key: the mask.
            size: bytes that it takes.
            make: called with a buffer of the same size to write into, if one was just freed, else None.

        Raises:
            CascadeError: the budget is smaller than this one mask.
        """
        prefetched = self._in_flight is not None and self._in_flight[0] == key  # counted already
        self._settle()
        self._pinned = key
        if key in self._entries:
            if not prefetched:
                self.count(key, hit=True)
            self._entries.move_to_end(key)
            return self._entries[key]
        if size > self.budget:
            raise CascadeError(f"the budget of {self.budget} bytes is below one mask's weights: allow at least {size}")
        self.count(key, hit=False)
        self._entries[key] = make(self._evict_for(size))
        self._use(size)
        return self._entries[key]

    def prefetch(self, key: Hashable, size: int, make: Make) -> bool:
        """Start to make the weights needed next, if they fit next to those in use.

        Returns:
            whether they are being made.
        """
        in_use = self._entries[self._pinned].nbytes if self._pinned in self._entries else 0
        if key in self or self._in_flight is not None or size + in_use > self.budget:
            return False
        self.count(key, hit=False)
        reuse = self._evict_for(size)
        self._use(size)
        self._in_flight = key, size, self._thread.submit(make, reuse)
        return True

    def clear(self) -> None:
        """Evict everything."""
        self._settle()
        while self._entries:
            self._drop(next(iter(self._entries)))

    def drop(self, key: Hashable) -> None:
        """Forget one mask, and evict its weights if they are cached."""
        self._settle()
        self.owners.pop(key, None)
        if key in self._entries:
            self._drop(key)

    def _settle(self) -> None:
        """Insert the prefetched weights. A failed prefetch is retried by ``get``, which raises."""
        if self._in_flight is None:
            return
        (key, size, future), self._in_flight = self._in_flight, None
        if future.exception() is None:
            self._entries[key] = future.result()
        else:
            self._use(-size)

    def _evict_for(self, size: int) -> Tensor | None:
        """Evict weights not in use until ``size`` bytes are free; return a buffer of that size if one was freed."""
        reuse = None
        while self.used + size > self.budget:
            freed = self._drop(next(key for key in self._entries if key != self._pinned))
            reuse = freed if freed.nbytes == size else None
            del freed  # otherwise it would stay allocated, over budget, while the next is made
        return reuse

    def _use(self, size: int) -> None:
        self.used += size
        metrics.MATERIALIZED_BYTES.set(self.used)

    def count(self, key: Hashable, hit: bool) -> None:
        """Count a cache hit or miss."""
        self.hits += hit
        self.misses += not hit
        metrics.count_mask(self.owners.get(key), hit)

    def _drop(self, key: Hashable) -> Tensor:
        weights = self._entries.pop(key)
        self._use(-weights.nbytes)
        self.evictions += 1
        metrics.MASK_EVICTIONS.inc()
        return weights
