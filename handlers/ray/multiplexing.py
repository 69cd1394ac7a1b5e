"""Model multiplexing: a replica whose memory is too small for the whole store loads bundles on demand.

Ray Serve keeps the LRU order and chooses the name to evict (``serve.multiplexed``). Its proxies send a request to a
replica that holds the bundle, if there is one.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ray import serve

from cascade.bundle.store import Identity, Store
from cascade.engine.registry import Registry, State
from cascade.errors import CascadeError

LEAVE = 60.0
"""Seconds that an eviction waits for the requests that use the bundle; they take at most 30."""


class StoreView(Store):
    """A view of a store that shows only the bundles called ``names``; initially (None) all of them.

    Attributes:
        listing: every bundle in the store at the last look.
    """

    def __init__(self, where: str | Path) -> None:
        super().__init__(where)
        self.names: frozenset[str] | None = None
        self.listing: dict[Identity, str] = {}

    def look(self) -> dict[Identity, str]:
        """List the visible bundles."""
        self.listing = super().look()
        return {i: stamp for i, stamp in self.listing.items() if self.names is None or i[0] in self.names}

    def prune(self, keep: dict[Identity, str]) -> None:
        """Also keep the copies of hidden bundles, which may be loaded again soon."""
        super().prune(self.listing)


class ResidentBundle:
    """A name with all its versions in memory. ``users`` counts the requests that need it."""

    def __init__(self, bundles: "ResidentBundles", name: str) -> None:
        self.bundles, self.name, self.users, self.evicted = bundles, name, 0, False

    def __del__(self) -> None:
        """Evict it. Serve's documented hook: called in a thread, before another model is loaded."""
        if not self.evicted:  # Python calls it again when the object is collected
            self.evicted = True
            self.bundles.evict(self)


class ResidentBundles:
    """The bundles in the memory of a replica.

    Args:
        registry: of a ``StoreView``, after its first look.

    Attributes:
        crowded: whether some bundle did not fit; if not, all are loaded and nothing is evicted.
        capacity: most names in memory at the same time, as many as fit at the start.

    Raises:
        CascadeError: fewer than two fit, and not all.
    """

    def __init__(self, registry: Registry, store: StoreView) -> None:
        self.registry, self.store = registry, store
        states = registry.states()
        too_large = {s.name for s in states if s.out_of_memory}
        loaded = {s.name for s in states if s.state == "ready"} - too_large
        self.crowded, self.capacity = bool(too_large), len(loaded)
        self._changed = threading.Condition()
        if not self.crowded:
            return
        if self.capacity < 2:
            raise CascadeError(f"memory for {self.capacity} of the store's bundles: allow enough for at least two")
        store.names = frozenset(loaded)
        registry.reload()

        async def load(name: str) -> ResidentBundle:
            await asyncio.to_thread(self._load, name)
            return ResidentBundle(self, name)

        self._get = serve.multiplexed(load, max_num_models_per_replica=self.capacity)

    async def begin(self) -> None:
        """Tell Serve which bundles are loaded."""
        for name in sorted(self.store.names or ()):
            await self._get(name)

    @asynccontextmanager
    async def using(self, name: str | None) -> AsyncIterator[None]:
        """Load the bundle if necessary, and keep it until the block ends; do nothing for one that can't be loaded."""
        bundle = None
        if self.crowded and name is not None and self._may_load(name):
            try:
                bundle = await self._get(name)
                bundle.users += 1
            except CascadeError:
                pass  # the registry has its state, which the answer reports
        try:
            yield
        finally:
            if bundle is not None:
                with self._changed:
                    bundle.users -= 1
                    self._changed.notify_all()

    def states(self, name: str | None = None) -> list[State]:
        """As in ``Registry``; a bundle that is not in memory counts as ready, since it is loaded on demand."""
        known = {(s.name, s.version): s for s in self.registry.states(name) if s.state != "removed"}
        others = [i for i in self.store.listing if i not in known and name in (None, i[0])] if self.crowded else []
        return [*known.values(), *(State(*identity, "ready") for identity in sorted(others))]

    def evict(self, bundle: ResidentBundle) -> None:
        """Unload a name after the requests that use it have been answered."""
        with self._changed:
            self._changed.wait_for(lambda: bundle.users == 0, LEAVE)
            self.store.names = (self.store.names or frozenset()) - {bundle.name}
        self.registry.reload()

    def _may_load(self, name: str) -> bool:
        """False for a broken bundle: requests for it must not evict good ones."""
        refused = {s.name for s in self.registry.states(name) if s.state == "refused"}
        return any(name == listed for listed, _ in self.store.listing) and name not in refused

    def _load(self, name: str) -> None:
        with self._changed:
            self.store.names = (self.store.names or frozenset()) | {name}
        self.registry.reload()
        if not any(s.state == "ready" for s in self.registry.states(name)):
            raise CascadeError(f"bundle {name} could not be loaded")
