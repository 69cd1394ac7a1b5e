"""Which masks' weights are materialised: a cache with a budget in bytes, the least recently used leaves first."""

from collections import OrderedDict
from collections.abc import Callable, Hashable

from torch import Tensor

from cascade import metrics
from cascade.errors import CascadeError


class Residency:
    """Materialised weights by mask.

    Attributes:
        budget: bytes that may be held at any moment.
        used: bytes held now.
        hits, misses, evictions: what happened so far.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self.hits = self.misses = self.evictions = 0
        self._held: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def get(self, key: Hashable, size: int, make: Callable[[Tensor | None], Tensor]) -> Tensor:
        """The weights of mask ``key``, made by ``make`` where they are not held.

        Args:
            key: the mask.
            size: bytes that it takes.
            make: called with a buffer of the same size to write into, if one was just freed, else None.

        Raises:
            CascadeError: the budget is smaller than this one mask.
        """
        if key in self._held:
            self.hits += 1
            metrics.MASK_HITS.inc()
            self._held.move_to_end(key)
            return self._held[key]
        if size > self.budget:
            raise CascadeError(f"the budget of {self.budget} bytes is below one mask's weights: give at least {size}")
        self.misses += 1
        metrics.MASK_MISSES.inc()
        reuse = None
        while self.used + size > self.budget:
            freed = self._drop(next(iter(self._held)))
            reuse = freed if freed.nbytes == size else None
            del freed  # or it would outlive its budget while the next is made
        self._held[key] = make(reuse)
        self.used += size
        metrics.MATERIALISED_BYTES.set(self.used)
        return self._held[key]

    def clear(self) -> None:
        """Drop everything that is held."""
        while self._held:
            self._drop(next(iter(self._held)))

    def drop(self, key: Hashable) -> None:
        """Let go of a mask that nobody will ask for again; nothing where it is not held."""
        if key in self._held:
            self._drop(key)

    def _drop(self, key: Hashable) -> Tensor:
        weights = self._held.pop(key)
        self.used -= weights.nbytes
        self.evictions += 1
        metrics.MASK_EVICTIONS.inc()
        metrics.MATERIALISED_BYTES.set(self.used)
        return weights
