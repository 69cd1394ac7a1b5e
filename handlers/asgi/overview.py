"""/v1/overview: the loaded bundles and their current statistics in one answer, for the page at /ui."""

from typing import Any

from fastapi import FastAPI, Request

from cascade.bundle.bundle import Bundle
from cascade.bundle.inspect import headline
from handlers.asgi.keys import EVERY
from handlers.asgi.service import Service

MOST = 200  # bundles
CLASSES = 50  # class names per bundle


def add(app: FastAPI, service: Service) -> None:
    """Add the route."""

    @app.get("/v1/overview", summary="The loaded bundles: what they know, their bytes, their times since the start")
    async def overview(request: Request) -> dict[str, Any]:
        opened = service.opened(request)
        mine = [bundle for bundle in service.engine.loaded if EVERY in opened or bundle.name in opened]
        stats = service.engine.stats()
        return {
            "bundles": [_card(service, bundle) for bundle in mine[:MOST]],
            "more": max(0, len(mine) - MOST),
            "memory": {name: stats[f"{name}_bytes"] for name in ("backbone", "packed", "materialized")},
        }


def _card(service: Service, bundle: Bundle) -> dict[str, Any]:
    """One bundle. ``bytes`` is the size of its files, ``pictures`` the number of its thumbnails."""
    card, times = bundle.card, service.batcher.statistics.of(bundle.name, bundle.version)
    measured = headline(bundle)
    return {
        "name": bundle.name,
        "version": bundle.version,
        "backbone": card.backbone.name,
        "size": bundle.preprocessing.size,
        "masks": len(bundle.masks),
        "classes": card.classes[:CLASSES],
        "number_of_classes": len(card.classes),
        "accuracy": None if measured is None else {"of": measured[0], "value": measured[1]},
        "bytes": sum(card.bytes.values()),
        "dispatched": bundle.domain is not None,
        "out_of_domain": bundle.ood is not None,
        "pictures": 0 if bundle.thumbnails is None else len(bundle.thumbnails),
        "images": times.images,
        "failures": times.failures,
        "unusual": times.unusual,
        "seconds": times.seconds,
        "last": times.last,
    }
