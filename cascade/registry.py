"""The model store: which bundles there are, and loading them into an engine."""

import logging
from dataclasses import dataclass
from pathlib import Path

from cascade import metrics
from cascade.bundle import CARD, read
from cascade.engine import Engine
from cascade.errors import CascadeError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """A bundle that was not loaded, and why."""

    path: Path
    reason: str


def discover(store: Path) -> list[Path]:
    """Folders ``<name>/<version>`` of a store that hold a card, sorted; hidden ones (being written) are passed over."""
    cards = (p.parent for p in Path(store).glob(f"*/*/{CARD}"))
    return sorted(p for p in cards if not any(part.startswith(".") for part in (p.name, p.parent.name)))


def load_store(engine: Engine, store: Path) -> list[Refusal]:
    """Add every bundle of a store to the engine; a bad one is refused by name and the rest goes on.

    Raises:
        CascadeError: no bundle at all could be loaded.
    """
    refused = []
    for path in discover(store):
        try:
            engine.add(read(path))
        except CascadeError as error:
            refused.append(Refusal(path, str(error)))
            metrics.refused(path.parent.name)
            log.error("refused bundle %s/%s: %s", path.parent.name, path.name, error)
    if not engine.bundles:
        why = f"; {refused[0].reason}" if refused else f": put bundles at {store}/<name>/<version>/"
        raise CascadeError(f"no bundle could be loaded from {store}{why}")
    return refused
