"""Which bundles a replica holds where not all of a store's fit: some names with all their versions, others on demand.

Serve keeps the order of use and says which name leaves (``serve.multiplexed``), and its proxies send a request to a
replica that holds its bundle, where there is one.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ray import serve

from cascade.bundle.store import Identity, Store
from cascade.engine.engine import FULL
from cascade.engine.registry import Registry, State
from cascade.errors import CascadeError

LEAVE = 60.0
"""Seconds that a bundle which has to leave waits for the requests that use it; their answers take 30 at most."""


class Part(Store):
    """A store of which only the bundles called ``names`` are seen; at first (None) all of them.

    Attributes:
        listing: everything that lay there at the last look.
    """

    def __init__(self, where: str | Path) -> None:
        super().__init__(where)
        self.names: frozenset[str] | None = None
        self.listing: dict[Identity, str] = {}

    def look(self) -> dict[Identity, str]:
        self.listing = super().look()
        return {i: stamp for i, stamp in self.listing.items() if self.names is None or i[0] in self.names}

    def prune(self, keep: dict[Identity, str]) -> None:
        super().prune(self.listing)  # what is not held now may be soon


class Held:
    """A name on the shelf. Serve calls ``__del__`` in a thread when it has to leave, before another one is loaded."""

    def __init__(self, shelf: "Shelf", name: str) -> None:
        self.shelf, self.name, self.users, self.gone = shelf, name, 0, False

    def __del__(self) -> None:
        if not self.gone:  # Python calls it once more
            self.gone = True
            self.shelf.drop(self)


class Shelf:
    """What a replica whose memory is too small for the whole store does about it.

    Args:
        registry: of a ``Part``, after its first look.

    Attributes:
        crowded: whether something did not fit; if not, everything is held and nothing happens here.
        capacity: names that are held at a time, as many as fit at the start.

    Raises:
        CascadeError: not all fit, and not even two do.
    """

    def __init__(self, registry: Registry, part: Part) -> None:
        self.registry, self.part = registry, part
        states = registry.states()
        left = {s.name for s in states if s.reason and FULL in s.reason}
        held = {s.name for s in states if s.state == "ready"} - left
        self.crowded, self.capacity = bool(left), len(held)
        self._free = threading.Condition()
        if not self.crowded:
            return
        if self.capacity < 2:
            raise CascadeError(f"memory for {self.capacity} of the store's bundles: give enough for two at least")
        part.names = frozenset(held)
        registry.reload()

        async def load(name: str) -> Held:
            await asyncio.to_thread(self._take, name)
            return Held(self, name)

        self._load = serve.multiplexed(load, max_num_models_per_replica=self.capacity)

    async def begin(self) -> None:
        """Tell Serve what is held."""
        for name in sorted(self.part.names or ()):
            await self._load(name)

    @asynccontextmanager
    async def holding(self, name: str | None) -> AsyncIterator[None]:
        """Have the bundle here until the block ends; one that is not in the store, or can't be loaded, is not there."""
        held = None
        if self.crowded and name is not None and self._known(name):
            try:
                held = await self._load(name)
                held.users += 1
            except CascadeError:
                pass  # it is a state of the registry: the answer says it
        try:
            yield
        finally:
            if held is not None:
                with self._free:
                    held.users -= 1
                    self._free.notify_all()

    def states(self, name: str | None = None) -> list[State]:
        """As of ``Registry``; what is not held at the moment is ready, too, for it will be when it is asked for."""
        known = {(s.name, s.version): s for s in self.registry.states(name) if s.state != "removed"}
        others = [i for i in self.part.listing if i not in known and name in (None, i[0])] if self.crowded else []
        return [*known.values(), *(State(*each, "ready") for each in sorted(others))]

    def drop(self, held: Held) -> None:
        """Let go of a name, once the requests that use it are answered."""
        with self._free:
            self._free.wait_for(lambda: held.users == 0, LEAVE)
            self.part.names = (self.part.names or frozenset()) - {held.name}
        self.registry.reload()

    def _known(self, name: str) -> bool:
        """Whether to try: a broken bundle must not drive out good ones with each request."""
        refused = {s.name for s in self.registry.states(name) if s.state == "refused"}
        return any(name == n for n, _ in self.part.listing) and name not in refused

    def _take(self, name: str) -> None:
        with self._free:
            self.part.names = (self.part.names or frozenset()) | {name}
        self.registry.reload()
        if not any(s.state == "ready" for s in self.registry.states(name)):
            raise CascadeError(f"bundle {name} could not be loaded")
