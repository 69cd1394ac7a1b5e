"""Load a store into an engine: all bundles at the start, or each on demand."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from cascade.bundle.store import Store
from cascade.cache import cache_folder
from cascade.engine.engine import Engine
from cascade.engine.journal import Journal
from cascade.engine.on_demand import OnDemandRegistry
from cascade.engine.registry import Registry
from cascade.errors import CascadeError

log = logging.getLogger(__name__)


def load_store(
    engine: Engine,
    where: str | Path | Store,
    pins: Mapping[str, str] | None = None,
    cache: Path | None = None,
    journal: Journal | None = None,
    on_demand: bool = False,
) -> Registry:
    """Load every valid bundle of a store into the engine and return the registry; a bad one is refused by name.

    Args:
        where, cache: as in :class:`cascade.bundle.store.Store`.
        pins, journal: as in :class:`Registry`.
        on_demand: load only the pinned bundles now, and others when they are requested.

    Raises:
        CascadeError: no bundle could be loaded; with ``on_demand``, the store is empty.
    """
    store = where if isinstance(where, Store) else Store(where, cache)
    if on_demand:
        recent = (cache or cache_folder()) / "recent" / f"{hashlib.sha256(store.where.encode()).hexdigest()[:16]}.json"
        registry: Registry = OnDemandRegistry(engine, store, pins, journal, recent=recent)
    else:
        registry = Registry(engine, store, pins, journal)
    registry.reload()
    if not registry.serves:
        refused = [s.reason for s in registry.states() if s.reason]
        why = (registry.trouble, *refused, f"put bundles at {store.where}/<name>/<version>/")
        raise CascadeError(f"no bundle could be loaded from {store.where}: {next(filter(None, why))}")
    for name, pin in engine.pins.items():
        for version in pin.weights:
            if (name, version) not in engine.bundles:
                log.warning("%s is pinned to version %s, which is not there", name, version)
    return registry
