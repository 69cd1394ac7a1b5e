"""The registry keeps an engine in sync with a model store while it serves.

A bad store or bundle never affects what is being served: a new version is read, verified and warmed up next to
the old one, and becomes visible atomically; a bad one is refused by name, and retried when its files change; while
the store is unreachable, the loaded bundles stay.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

from cascade import metrics
from cascade.bundle.bundle import Bundle, BundleError
from cascade.bundle.store import Identity, Store, StoreError
from cascade.engine.engine import Engine
from cascade.engine.journal import Journal
from cascade.engine.loaded import number
from cascade.engine.pins import parse
from cascade.engine.results import ItemError
from cascade.errors import CascadeError, OutOfMemory

log = logging.getLogger(__name__)
RETRY = 60.0
"""Seconds until a retry if the fault may be outside the bundle: memory, disk, network, weights."""
LASTING = float("inf")
LEAVE = 2.0
"""Seconds to wait at the end for a check of the store in progress."""
MOST_DEATHS = 2
"""Processes that may die while loading a bundle. The first death may have had another reason, like kill -9."""
REMEMBERED = 100
"""Removed bundles whose state is still reported."""
Kind = Literal["ready", "stored", "loading", "refused", "removed"]


File = tuple[Bundle, str] | Callable[[], CascadeError]
"""A bundle and its digest, or the error from reading it. A function, because the traceback of an exception that is kept
would keep the memory of evicted bundles until the next garbage collection."""


@dataclass(frozen=True)
class State:
    """The current state of a bundle in the store.

    Attributes:
        state: a ready one answers requests; a stored one is loaded when a request names it
            (``cascade.engine.on_demand``); a removed one is no longer in the store.
        reason: why it was refused; for a ready one, why the files that have replaced it can't be used.
            Local paths are left out; they are only logged.
        out_of_memory: whether it was refused for lack of memory.
    """

    name: str
    version: str
    state: Kind
    reason: str | None = None
    out_of_memory: bool = False


@dataclass(frozen=True)
class _Bad:
    """A failed attempt to load a bundle, not retried before ``again`` (monotonic) unless its stamp changes."""

    stamp: str
    again: float


class Registry:
    """Loads the bundles of a store into an engine, and follows the store's changes.

    Args:
        engine: serves the bundles; nothing else adds or removes any.
        store: where the bundles are.
        pins: by bundle name, the version for requests without one (``cascade.engine.pins.parse``); all other bundles
            answer with their latest version.
        journal: lists the bundles that killed earlier processes.
    """

    def __init__(
        self, engine: Engine, store: Store, pins: Mapping[str, str] | None = None, journal: Journal | None = None
    ) -> None:
        self.engine, self.store, self.journal = engine, store, journal or Journal()
        texts = {**(pins or {}), **self.journal.pins}
        engine.pins = {name: parse(text) for name, text in texts.items() if text is not None}
        engine.explain = self.explain
        self._held: dict[Identity, tuple[str, str]] = {}  # (stamp, digest) of what is served
        self._bad: dict[Identity, _Bad] = {}
        self._states: dict[Identity, State] = {}  # replaced, never changed: readers need no lock
        self._trouble: str | None = None
        self._unloaded: frozenset[str] = frozenset()
        self._looking = threading.Lock()
        self._changing = threading.Lock()  # of what is loaded; taken after the other one

    def states(self, name: str | None = None) -> list[State]:
        """The states of all bundles in the store (or those called ``name``), versions ascending; thread-safe."""
        found = [s for s in self._states.values() if name in (None, s.name)]
        return sorted(found, key=lambda s: (s.name, number(s.version)))

    def explain(self, error: ItemError, name: str, version: str | None) -> ItemError:
        """Add to the error for a missing bundle why its versions are refused.

        It is ``bundle_unavailable``, with the time of the next attempt, if the fault may be outside the bundle.
        """
        states, why, again = self._states, "", LASTING
        for identity, bad in self._bad.items():
            if identity[0] == name and version in (None, identity[1]):
                state = states.get(identity)
                why += f"; version {identity[1]} is refused: {state.reason if state else 'see the log'}"
                again = min(again, bad.again)
        if again == LASTING:
            return replace(error, message=error.message + why)
        message = f"this bundle can't be loaded now: send the request again later{why}"
        return ItemError("bundle_unavailable", message, max(1.0, again - time.monotonic()))

    @property
    def trouble(self) -> str | None:
        """Why the store currently can't be read, or None."""
        return self._trouble

    @property
    def unloaded(self) -> frozenset[str]:
        """Names removed by ``unload``."""
        return self._unloaded

    def unload(self, name: str) -> None:
        """Remove a name, although it is in the store, until ``load`` or the end of the process."""
        self._unloaded |= {name}
        self.reload()

    def pin(self, name: str, text: str | None) -> None:
        """Pin a name, until the server ends; None removes its pin.

        Raises:
            CascadeError: this is no pin, or the store does not have its versions.
        """
        pin = None if text is None else parse(text)
        versions = {state.version for state in self.states(name) if state.state != "removed"}
        if pin and (missing := pin.weights.keys() - versions):
            raise CascadeError(f"the store has no version {', '.join(sorted(missing))} of this bundle")
        with self._changing:
            others = {n: p for n, p in self.engine.pins.items() if n != name}
            self.engine.pins = {**others, name: pin} if pin else others
            self.journal.pin(name, text)

    def load(self, name: str) -> list[State]:
        """Check the bundles of a name again, including refused and unloaded ones, and return their states."""
        self._unloaded -= {name}
        with self._changing:
            self._bad = {i: bad for i, bad in self._bad.items() if i[0] != name}
        self.reload()
        return self.states(name)

    @property
    def serves(self) -> bool:
        """Whether any bundle is loaded, or would be when a request names it."""
        return bool(self.engine.bundles)

    def reload(self) -> None:
        """Check the store now: load new bundles, remove missing ones; failures become states, logged and counted."""
        with self._looking:
            self.engine.release()
            try:
                listed = self.store.look()
                if not listed and self._held:
                    raise StoreError(f"the store {self.store.where} is empty: is it mounted? The last bundles stay")
            except StoreError as error:
                self._is_reachable(str(error))
                metrics.RELOADS.labels("failed").inc()
                if not self._held:
                    with self._changing:
                        self._load(self._visible(self.store.cached()))
                return
            self._is_reachable(None)
            with self._changing:
                self._follow(self._visible(listed))
            self.store.prune(listed)

    def _visible(self, listed: Mapping[Identity, str]) -> dict[Identity, str]:
        """The bundles of the store that should be loaded."""
        return {i: stamp for i, stamp in listed.items() if i[0] not in self._unloaded}

    def _follow(self, found: Mapping[Identity, str]) -> None:
        """Load new bundles, and remove missing ones."""
        before = self._held
        names = {name for name, _ in found}
        for identity in [i for i in self._states if i not in found and i[0] not in names]:
            self._take_away(identity)  # first, to free memory
        self._load(found)
        loaded = {name for name, version in self._held if (name, version) in found}
        for identity in [i for i in self._states if i not in found]:
            if identity[0] in loaded or identity not in self._held:
                self._take_away(identity)
            else:  # a name always keeps a working version
                why = "it is gone from the store, and serves until another version is loaded, or the name is gone"
                self._set(identity, "ready", why)
        metrics.RELOADS.labels("unchanged" if self._held == before else "changed").inc()

    @contextmanager
    def watching(self, interval: float) -> Iterator[None]:
        """Check the store every ``interval`` seconds, in a thread, until the block ends; 0 for never."""
        stop = threading.Event()

        def watch() -> None:
            step: Callable[[], object] = self.prefetch
            while True:
                try:
                    step()
                    self.learn(stop)
                except Exception:  # a bug must not end the watch silently
                    log.exception("the store could not be looked at")
                if stop.wait(interval):
                    return self.remember()
                step = self.reload
                self.remember()

        thread = threading.Thread(target=watch, name="cascade-registry", daemon=True)
        if interval > 0:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if interval > 0:
                thread.join(LEAVE)  # a download that hangs ends with the process

    def prefetch(self) -> None:
        """Called once, in the background, to load bundles before they are requested. Nothing here: all are loaded."""

    def learn(self, stop: threading.Event | None = None) -> None:
        """Called after each check of the store, to read what dispatch needs of bundles that are not in memory.

        Args:
            stop: ends it early.
        """

    def remember(self) -> None:
        """Called after each check of the store, to save what ``prefetch`` needs."""

    def _load(self, found: Mapping[Identity, str], files: Mapping[Identity, File] = MappingProxyType({})) -> None:
        """Load bundles that are not loaded yet. ``files``: those already read."""
        for identity in sorted(found, key=lambda i: (i[0], number(i[1]))):
            replaces = [i for i in self._held if i[0] == identity[0] and i not in found]
            self._consider(identity, found[identity], replaces, files.get(identity))

    def _consider(self, identity: Identity, stamp: str, replaces: Sequence[Identity], file: File | None) -> None:
        held, bad = self._held.get(identity), self._bad.get(identity)
        if held and held[0] == stamp:
            if bad or self._states[identity].reason:
                self._set(identity, "ready")
            return
        if bad and bad.stamp == stamp and time.monotonic() < bad.again:
            return
        if (deaths := self.journal.deaths(identity, stamp)) and bad is None:
            again = time.monotonic() + RETRY if deaths < MOST_DEATHS else LASTING
            reason = f"the engine process died while loading it, {deaths} times: it may need more memory than there is"
            self._set(identity, "refused", reason, _Bad(stamp, again))
            return
        known = self._states.get(identity)
        if known is None or known.state == "removed":
            self._set(identity, "loading")
        try:
            with self.journal.loading(identity, stamp):
                if callable(file):
                    raise file()
                bundle, digest = file or self.store.read(*identity, memory=self.engine.resident.memory_bytes)
                if held and digest != held[1]:
                    raise BundleError("its files differ from those being served: publish changes as a new version")
                if not held:
                    self._add(bundle, replaces)
        except Exception as error:
            ours = isinstance(error, CascadeError)
            if not ours and not (bad and bad.stamp == stamp):  # from a library, for a reason that no check foresaw
                log.exception("bundle %s/%s can't be used", *identity)
            again = LASTING if isinstance(error, BundleError) else time.monotonic() + RETRY
            reason = str(error) if ours else f"it can't be used ({type(error).__name__}); the log has the traceback"
            full = isinstance(error, OutOfMemory)
            self._set(identity, "ready" if held else "refused", reason, _Bad(stamp, again), full)
        else:
            self._held = {**self._held, identity: (stamp, digest)}
            self._set(identity, "ready")

    def _add(self, bundle: Bundle, replaces: Sequence[Identity]) -> None:
        self.engine.add(bundle, warm=True, replaces=replaces)

    def _take_away(self, identity: Identity) -> None:
        if identity in self._held:
            self.engine.remove(*identity)
            self._held = {i: h for i, h in self._held.items() if i != identity}
            # Retry bundles that were refused for lack of memory: there may be enough now.
            self._bad = {i: b if b.again == LASTING else _Bad(b.stamp, 0.0) for i, b in self._bad.items()}
            self._set(identity, "removed")
        elif self._states[identity].state != "removed":
            self._set(identity, None)

    def _set(
        self,
        identity: Identity,
        state: Kind | None,
        reason: str | None = None,
        bad: _Bad | None = None,
        out_of_memory: bool = False,
    ) -> None:
        """Publish a state: to front ends, in the metrics and, if it has changed, in the log."""
        name, version = identity
        told = reason and self.store.public(reason)
        old, new = self._states.get(identity), State(name, version, state, told, out_of_memory) if state else None
        others = {i: s for i, s in self._states.items() if i != identity}
        self._states = {**others, identity: new} if new else others
        self._bad = {i: b for i, b in self._bad.items() if i != identity} | ({identity: bad} if bad else {})
        for forgotten in [i for i, s in self._states.items() if s.state == "removed"][:-REMEMBERED]:
            self._states = {i: s for i, s in self._states.items() if i != forgotten}
        metrics.refused(name, any(n == name for n, _ in self._bad))
        self._count()
        if reason and bad is None and (old is None or old.reason != told):
            log.warning("bundle %s/%s: %s", name, version, reason)
        elif reason and (old is None or old.reason != told):
            log.error("refused bundle %s/%s: %s", name, version, reason)
        elif new and old and new.state != old.state and state in ("ready", "removed"):
            log.info("bundle %s/%s: %s", name, version, state)

    def _count(self) -> None:
        states = Counter(state.state for state in self._states.values())
        for each in get_args(Kind):
            metrics.BUNDLES.labels(each).set(states[each])

    def _is_reachable(self, trouble: str | None) -> None:
        metrics.STORE_UNREACHABLE.set(trouble is not None)
        if trouble and self._trouble is None:
            log.error("%s; loaded bundles are still served", trouble)
        elif self._trouble and trouble is None:
            log.warning("the store %s is reachable again", self.store.where)
        self._trouble = trouble
