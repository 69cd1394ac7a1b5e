"""What a bundle is made of, for the page's Look inside: its map, pictures, masks, and how sure it is.

Every route needs the key of its bundle. Nothing is computed that takes longer than writing the answer: the map and the
pictures lie in the bundle, a mask's bits are counted in milliseconds. Browsers keep the answers for a while.
"""

import asyncio
import re
from dataclasses import asdict

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from cascade.bundle.bundle import Bundle
from cascade.bundle.map import NO_CLUSTER
from cascade.bundle.thumbnails import media_type
from cascade.engine import mask_layers
from cascade.engine.results import ItemError
from cascade.model.masks import Mask
from handlers.asgi import ui
from handlers.asgi.keys import EVERY
from handlers.asgi.middleware import Refusal
from handlers.asgi.service import Service

ROWS = 20_000  # of a bank that are sent
SECONDS = 300  # that browsers keep an answer
HEADERS = ui.HEADERS | {"Cache-Control": f"private, max-age={SECONDS}", "Vary": "Authorization"}
ROW = re.compile(r"[0-9]{1,9}")
PICTURE = {"type": "string", "format": "binary"}
NO_BANK = ItemError("no_bank", "this bundle has no neighbor bank")
NO_PICTURE = ItemError("no_thumbnail", "this bundle has no picture of that row of its neighbor bank")
NO_MASK = ItemError("unknown_mask", "this bundle has no such mask: dispatcher, expert-0, expert-1, ...")
APART = ItemError("other_backbone", "masks of different backbones can't be compared: choose a bundle of the same one")


def add(app: FastAPI, service: Service) -> None:
    """Add the routes."""

    async def find(request: Request, name: str, version: str | None) -> Bundle:
        service.check(request, name)
        bundle = await service.find(name, version)
        if isinstance(bundle, ItemError):
            raise Refusal(bundle)
        return bundle

    @app.get("/v1/map/{bundle}/{version}", summary="The neighbor bank in two dimensions")
    async def places(request: Request, bundle: str, version: str) -> Response:
        return await asyncio.to_thread(_places, await find(request, bundle, version))

    @app.get(
        "/v1/thumbnails/{bundle}/{version}/{row}",
        summary="A picture of the neighbor bank",
        response_class=Response,
        responses={200: {"content": {kind: {"schema": PICTURE} for kind in ("image/webp", "image/png", "image/jpeg")}}},
    )
    async def thumbnail(request: Request, bundle: str, version: str, row: str) -> Response:
        pictures = (await find(request, bundle, version)).thumbnails
        if pictures is None or not ROW.fullmatch(row) or int(row) >= len(pictures):
            raise Refusal(NO_PICTURE)
        file = pictures[int(row)]
        return Response(file, headers=HEADERS, media_type=media_type(file))

    @app.get("/v1/masks/{bundle}/{version}/{mask}", summary="What a mask switches off, layer by layer")
    async def masks(
        request: Request,
        bundle: str,
        version: str,
        mask: str,
        other: str | None = None,
        other_version: str | None = None,
        other_mask: str = "dispatcher",
    ) -> Response:
        mine = await find(request, bundle, version)
        theirs = None if other is None else await find(request, other, other_version)
        pair = _mask(mine, mask), None if theirs is None else _mask(theirs, other_mask)
        if theirs is not None and theirs.card.backbone.fingerprint != mine.card.backbone.fingerprint:
            raise Refusal(APART)
        found = await asyncio.to_thread(mask_layers.layers, service.engine.executor(mine), *pair)
        about = {
            "stages": mine.card.backbone.stages,
            "masks": [each.model_dump() for each in mine.card.masks],
            "delta": mask_layers.is_delta(pair[0]),
            "other_delta": pair[1] is not None and mask_layers.is_delta(pair[1]),
            "layers": [asdict(layer) for layer in found],
        }
        return JSONResponse(about, headers=HEADERS)

    @app.get("/v1/reliability/{bundle}/{version}", summary="How sure a bundle is, and how often it is right")
    async def confidence(request: Request, bundle: str, version: str) -> Response:
        found, opened = await find(request, bundle, version), service.opened(request)
        table = await asyncio.to_thread(service.engine.dispatch_table)
        spaces = () if isinstance(table, ItemError) else table.spaces
        among = None if EVERY in opened else opened
        curves = [await asyncio.to_thread(space.reliability, found.identity, among) for space in spaces]
        dispatch = next((curve for curve in curves if curve is not None), None)
        measured = found.card.accuracy.get("reliability")
        known = measured if isinstance(measured, dict) else {}
        bins = {name: known.get(name) for name in ("labels", "clusters")}
        return JSONResponse({"dispatch": dispatch, **bins}, headers=HEADERS)


def _places(bundle: Bundle) -> Response:
    """Names, labels, places and clusters of the bank's rows; the last two are empty if they are not known."""
    bank, own = bundle.banks.get(bundle.card.mode), bundle.map
    if bank is None:
        raise Refusal(NO_BANK)
    clusters = [] if own is None or not (own.clusters != NO_CLUSTER).any() else own.clusters[:ROWS].tolist()
    about = {
        "names": bank.names[:ROWS],
        "labels": bank.labels[:ROWS],
        "points": [] if own is None else [[round(x, 4), round(y, 4)] for x, y in own.points[:ROWS].tolist()],
        "clusters": clusters,
        "more": max(0, len(bank.names) - ROWS),
        "thumbnails": bundle.thumbnails is not None,
    }
    return JSONResponse(about, headers=HEADERS)


def _mask(bundle: Bundle, name: str) -> Mask:
    for mask in bundle.masks:
        if mask.name == name:
            return mask
    raise Refusal(NO_MASK)
