"""/v1/overview: the bundles and their current statistics in one answer, for the page at /ui."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request

from cascade.bundle.bundle import Bundle
from cascade.bundle.inspect import headline
from cascade.bundle.schema import Card
from cascade.engine.on_demand import OnDemandRegistry
from handlers.asgi.keys import EVERY
from handlers.asgi.service import Service

MOST = 200  # bundles
CLASSES = 50  # class names per bundle


def add(app: FastAPI, service: Service) -> None:
    """Add the route."""

    @app.get("/v1/overview", summary="The bundles: what they know, their bytes, their times since the start")
    async def overview(request: Request) -> dict[str, Any]:
        opened = service.opened(request)
        mine = [bundle for bundle in service.engine.loaded if EVERY in opened or bundle.name in opened]
        cards = [_card(service, *bundle.identity, bundle.card, bundle) for bundle in mine[:MOST]]
        stored, more = await asyncio.to_thread(_stored, service, request, MOST - len(cards))
        stats = service.engine.stats()
        return {
            "bundles": cards + stored,
            "more": max(0, len(mine) - MOST) + more,
            "memory": {name: stats[f"{name}_bytes"] for name in ("backbone", "packed", "materialized")},
        }


def _stored(service: Service, request: Request, most: int) -> tuple[list[dict[str, Any]], int]:
    """Bundles that are loaded on demand, from their cards, and how many more there are."""
    if not isinstance(service.registry, OnDemandRegistry):
        return [], 0
    states = [s for own in service.states(request).values() for s in own if s.state == "stored"]
    cards = [(s, service.registry.card(s.name, s.version)) for s in states[:most]]
    return [_card(service, s.name, s.version, card) for s, card in cards if card is not None], len(states[most:])


def _card(service: Service, name: str, version: str, card: Card, bundle: Bundle | None = None) -> dict[str, Any]:
    """One bundle, which is None while it is not in memory.

    ``bytes`` is the size of its files, ``pictures`` the number of its thumbnails. ``executor.error`` is the largest
    relative error of the backbone's features when the executor was chosen.
    """
    executor = None if bundle is None else service.engine.executor(bundle)
    times = service.batcher.statistics.of(name, version)
    measured = headline(card, bool(card.classes) if bundle is None else bool(bundle.linear))
    return {
        "name": name,
        "version": version,
        "loaded": bundle is not None,
        "backbone": card.backbone.name,
        "executor": None if executor is None else {"kind": executor.kind, "error": executor.error},
        "size": card.preprocessing["size"],
        "masks": len(card.masks),
        "classes": card.classes[:CLASSES],
        "number_of_classes": len(card.classes),
        "accuracy": None if measured is None else {"of": measured[0], "value": measured[1]},
        "bytes": sum(card.bytes.values()),
        "dispatched": card.domain is not None,
        "out_of_domain": bundle is not None and bundle.ood is not None,
        "pictures": 0 if bundle is None or bundle.thumbnails is None else len(bundle.thumbnails),
        "images": times.images,
        "failures": times.failures,
        "unusual": times.unusual,
        "seconds": times.seconds,
        "last": times.last,
    }
