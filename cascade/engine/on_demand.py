"""On-demand bundles: a store of any size, where each bundle is loaded when a request first names it.

The least recently used bundles are evicted when memory is full (LRU, in bytes). Their files stay in the store, so the
next request loads them again.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cascade import atomic, metrics
from cascade.bundle.bundle import Bundle
from cascade.bundle.store import Identity
from cascade.engine.loaded import number
from cascade.engine.registry import File, Registry, State
from cascade.errors import CascadeError

LEAVE = 10.0
"""Seconds to wait until the last requests of evicted bundles are answered and their memory is free."""
CHECK = 0.005  # seconds between two such checks
REMEMBERED = 1000  # names in the file of recent ones

log = logging.getLogger(__name__)


class OnDemandRegistry(Registry):
    """A registry that lists every bundle of its store, and keeps the recently used ones in memory.

    A name is loaded with all its versions. Pinned names are loaded at the start and never evicted. Images are only
    dispatched to bundles in memory. Nothing is ever evicted for a bundle that can't be loaded anyway.

    Args:
        recent: file with recently used names, most recent first; they are prefetched in the background after a restart.
            None: every start is cold.
        options: of ``Registry``.

    Attributes:
        crowded: whether a bundle has been evicted.
    """

    def __init__(self, *args: Any, recent: Path | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.recent, self.crowded = recent, False
        self._names: frozenset[str] = frozenset(self.engine.pins)  # in memory, or to be
        self._listing: dict[str, dict[Identity, str]] = {}  # all of the store, by name
        self._listed = 0  # bundles in it
        self._fetching: dict[str, threading.Lock] = {}
        self.engine.on_missing = self.fetch

    def states(self, name: str | None = None) -> list[State]:
        """As in ``Registry``; ``stored`` bundles are loaded when a request names them."""
        known = super().states(name)
        names = {state.name for state in known if state.state != "removed"}
        listing = self._listing if name is None else {name: self._listing.get(name, {})}
        stored = [State(*identity, "stored") for n, own in listing.items() if n not in names for identity in own]
        return sorted([*(s for s in known if s.name in names), *stored], key=lambda s: (s.name, number(s.version)))

    def fetch(self, name: str) -> None:
        """Load the bundles of a name, unless they are loaded, refused, or not in the store.

        Concurrent calls for other names may read their files at the same time.
        """
        own = self._listing.get(name)
        if own is None or self._is_refused(own):
            return
        with self._fetching.setdefault(name, threading.Lock()):
            if name in self.engine.names:
                return
            files = {identity: self._read(identity) for identity in own}
            with self._changing:
                own = {i: stamp for i, stamp in self._listing.get(name, {}).items() if i in files}
                self._names |= {name}  # also if refused, so that each look at the store can retry it
                self._load(own, files)
                metrics.count_cold_load(name)
        self._fetching.pop(name, None)

    def load(self, name: str) -> list[State]:
        """As in ``Registry``; the bundle is then in memory."""
        self._names |= {name}
        return super().load(name)

    def prefetch(self) -> None:
        """Load the names that were in use before the last restart, while they fit; nothing is evicted for them."""
        for name in self._remembered():
            used = self.engine.stats()
            next_one = used["packed_bytes"] / max(1, used["bundles"])
            room = (self.engine.memory_bytes or math.inf) - used["backbone_bytes"] - used["packed_bytes"]
            if room < 2 * next_one:
                return
            self.fetch(name)

    def remember(self) -> None:
        """Write the names in use to a file, for ``prefetch``."""
        if self.recent is None:
            return
        used = sorted(self.engine.names, key=lambda n: self.engine.last_used.get(n, 0.0), reverse=True)[:REMEMBERED]
        if used == self._remembered():
            return
        try:
            self.recent.parent.mkdir(parents=True, exist_ok=True)
            with atomic.file(self.recent) as beside:
                beside.write_text(json.dumps(used))
        except OSError as error:
            log.warning("the names of recent bundles can't be written to %s: %s", self.recent, error.strerror)

    def _visible(self, listed: Mapping[Identity, str]) -> dict[Identity, str]:
        listing: dict[str, dict[Identity, str]] = {}
        for identity, stamp in super()._visible(listed).items():
            listing.setdefault(identity[0], {})[identity] = stamp
        self._listing, self._listed = listing, sum(map(len, listing.values()))
        return {i: stamp for name in self._names for i, stamp in listing.get(name, {}).items()}

    def _add(self, bundle: Bundle, replaces: Iterable[Identity]) -> None:
        """Add a bundle to the engine; while memory is full, evict the least recently used name."""
        deadline = time.monotonic() + LEAVE
        left = True  # whether a removed bundle may have been in memory when the engine looked

        def make_room() -> bool:
            nonlocal left
            if self._evict(bundle.name):
                return True
            before, left = left, self.engine.leaving
            if not (before or left) or time.monotonic() > deadline:
                return False
            time.sleep(CHECK)  # until the last requests of an evicted one are answered
            self.engine.release()
            return True

        self.engine.add(bundle, replaces=[*replaces], make_room=make_room)

    def _evict(self, besides: str) -> bool:
        """Evict the least recently used name; False if none can be evicted."""
        names = {name for name, _ in self._held if name != besides and name not in self.engine.pins}
        if not names:
            return False
        self.crowded = True
        oldest = min(names, key=lambda name: self.engine.last_used.get(name, 0.0))
        self._names -= {oldest}
        for identity in [i for i in self._held if i[0] == oldest]:
            self._take_away(identity)
            self._set(identity, None)
        self.engine.last_used.pop(oldest, None)
        metrics.BUNDLE_EVICTIONS.inc()
        return True

    def _count(self) -> None:
        super()._count()
        held = {name for name, _ in self._held}
        metrics.BUNDLES.labels("stored").set(self._listed - sum(len(self._listing.get(name, ())) for name in held))

    def _read(self, identity: Identity) -> File:
        try:
            return self.store.read(*identity, memory=self.engine.memory_bytes)
        except CascadeError as error:
            return partial(type(error), str(error))

    def _is_refused(self, own: Mapping[Identity, str]) -> bool:
        """Whether every version was refused recently, with the same files."""
        now = time.monotonic()
        bad = ((self._bad.get(identity), stamp) for identity, stamp in own.items())
        return all(b is not None and b.stamp == stamp and now < b.again for b, stamp in bad)

    def _remembered(self) -> list[str]:
        try:
            names = json.loads(self.recent.read_text()) if self.recent is not None else []
        except (OSError, ValueError):
            return []
        return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
