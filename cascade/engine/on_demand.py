"""On-demand bundles: a store of any size, where each bundle is loaded when a request first names it.

The least recently used bundles are evicted when memory is full (LRU, in bytes). Their files stay in the store, so the
next request loads them again.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from cascade import atomic, metrics
from cascade.bundle.bundle import Bundle, BundleError
from cascade.bundle.schema import Card
from cascade.bundle.store import Identity
from cascade.engine.dispatch_table import DispatchTable, Target
from cascade.engine.loaded import number
from cascade.engine.registry import File, Registry, State
from cascade.errors import CascadeError

LEAVE = 10.0
"""Seconds to wait until the last requests of evicted bundles are answered and their memory is free."""
CHECK = 0.005  # seconds between two such checks
DOMAINS, SHARE = 2**28, 1 / 8
"""Most bytes of all domains (enough for 10,000 bundles), and most of them as a share of a limited memory."""
CARDS = 256  # that are kept for the page
NEVER = threading.Event()
REMEMBERED = 1000  # names in the file of recent ones
PATIENCE = 60.0
"""Most seconds that reading domains waits for bundles being loaded."""

log = logging.getLogger(__name__)


class OnDemandRegistry(Registry):
    """A registry that lists every bundle of its store, and keeps the recently used ones in memory.

    A name is loaded with all its versions. Pinned names are loaded at the start and never evicted. The domains of all
    bundles are read in the background, so that images are dispatched to those that are not in memory, too. Nothing is
    ever evicted for a bundle that can't be loaded anyway.

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
        self._card = lru_cache(CARDS)(self._read_card)
        self._fetching: dict[str, threading.Lock] = {}
        self._domains: dict[Identity, tuple[str, Target | None]] = {}  # with the stamp of the files
        self.engine.on_missing = self.fetch

    def states(self, name: str | None = None) -> list[State]:
        """As in ``Registry``; ``stored`` bundles are loaded when a request names them."""
        known = super().states(name)
        names = {state.name for state in known if state.state != "removed"}
        listing = self._listing if name is None else {name: self._listing.get(name, {})}
        stored = [State(*identity, "stored") for n, own in listing.items() if n not in names for identity in own]
        return sorted([*(s for s in known if s.name in names), *stored], key=lambda s: (s.name, number(s.version)))

    @property
    def serves(self) -> bool:
        known = {state.name for state in super().states() if state.state != "removed"}
        return super().serves or not known >= self._listing.keys()

    def fetch(self, name: str) -> None:
        """Load the bundles of a name, unless they are loaded, refused, or not in the store.

        Concurrent calls for other names may read their files at the same time.
        """
        own = self._listing.get(name)
        if own is None or self._is_refused(own):
            return
        with self._once(name):
            if name in self.engine.names:
                return
            files = {identity: self._read(identity) for identity in own}
            with self._changing:
                own = {i: stamp for i, stamp in self._listing.get(name, {}).items() if i in files}
                self._names |= {name}  # also if refused, so that each look at the store can retry it
                self._load(own, files)
                metrics.count_cold_load(name)

    def load(self, name: str) -> list[State]:
        """As in ``Registry``; the bundle is then in memory."""
        self._names |= {name}
        return super().load(name)

    def prefetch(self) -> None:
        """Load the names that were in use before the last restart, while they fit; nothing is evicted for them."""
        for name in self._remembered():
            used = self.engine.stats()
            next_one = used["packed_bytes"] / max(1, used["bundles"])
            room = (self.engine.resident.memory_bytes or math.inf) - used["backbone_bytes"] - used["packed_bytes"]
            if room < 2 * next_one:
                return
            self.fetch(name)

    def learn(self, stop: threading.Event | None = None) -> None:
        """Read the domains of new bundles, and let images be dispatched to every bundle of the store.

        They take at most ``DOMAINS`` bytes, or a share of the engine's memory, in the order of the names. Requests that
        wait for a bundle to be loaded come first, and half of the time is left to others.
        """
        listing = self._listing
        served = self._served(listing)
        room = min(DOMAINS, (self.engine.resident.memory_bytes or math.inf) * SHARE)
        known: dict[Identity, tuple[str, Target | None]] = {}
        stop, deadline = stop or NEVER, time.monotonic() + PATIENCE
        for n, identity in enumerate(served):
            stamp, found = listing[identity[0]][identity], self._domains.get(identity)
            if found is None or found[0] != stamp:
                while self._fetching and time.monotonic() < deadline:
                    if stop.wait(CHECK):
                        return
                begun = time.monotonic()
                found = self._target(identity, stamp)
                if stop.wait(time.monotonic() - begun):
                    return
            room -= found[1].bytes() if found is not None and found[1] is not None else 0
            if room < 0:
                if len(known) != len(self._domains):
                    log.warning("the domains of %d bundles don't fit into memory: name these bundles", len(served) - n)
                break
            if found is not None:
                known[identity] = found
        if self.engine.known is None or known != self._domains:
            self.engine.known = DispatchTable.of(target for _, target in known.values())
        self._domains = known

    def _served(self, listing: Mapping[str, Mapping[Identity, str]]) -> list[Identity]:
        """The version of each name that answers requests without one, unless it is refused."""
        served = []
        for name, own in sorted(listing.items()):
            versions = [version for _, version in own if (name, version) not in self._bad]
            pin = self.engine.pins.get(name)
            version = max(versions, key=number, default=None) if pin is None else pin.main(versions)
            if version is not None:
                served.append((name, version))
        return served

    def _target(self, identity: Identity, stamp: str) -> tuple[str, Target | None] | None:
        """The stamp and the target of a bundle; None if it is not on this machine yet.

        The target is None without a domain, or if that can't be read, which the first request for the bundle tells.
        """
        try:
            found = self.store.read_domain(*identity)
        except BundleError:
            return stamp, None
        return None if found is None else (stamp, Target.read(*identity, *found, self.engine.resident.device))

    def card(self, name: str, version: str) -> Card | None:
        """The card of a bundle in memory or not; None if there is none, or it can't be read on this machine."""
        stamp = self._listing.get(name, {}).get((name, version))
        try:
            return None if stamp is None else self._card(name, version, stamp)
        except BundleError:
            return None

    def _read_card(self, name: str, version: str, stamp: str) -> Card:
        found = self.store.read_domain(name, version)
        if found is None:
            raise BundleError(f"bundle {name}/{version} was not downloaded yet")  # so that this is not kept
        return found[0]

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
            bundle, digest = self.store.read(*identity, memory=self.engine.resident.memory_bytes)
            self.engine.resident.export(bundle)
            return bundle, digest
        except CascadeError as error:
            return partial(type(error), str(error))

    @contextmanager
    def _once(self, name: str) -> Iterator[None]:
        """Load a name: other threads that want the same one wait."""
        try:
            with self._fetching.setdefault(name, threading.Lock()):
                yield
        finally:
            self._fetching.pop(name, None)

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
