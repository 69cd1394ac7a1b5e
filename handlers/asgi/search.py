"""POST /v1/search: the images of an index that are most similar to one (``cascade serve --index INDEX``)."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import FastAPI, Request

from cascade.bundle.format import Bundle, digest
from cascade.engine.results import ItemError
from cascade.errors import CascadeError
from cascade.offline.index.live import LiveIndex
from cascade.offline.index.where import MOST as MOST_CONDITIONS
from handlers.asgi.middleware import Refusal
from handlers.asgi.service import Service
from handlers.requests import parse

MOST = 100  # results
K = {"name": "k", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": MOST, "default": 10}}
WHERE = {
    "name": "where",
    "in": "query",
    "description": "Conditions that the images must fit, such as price<10 or category=shoes.",
    "schema": {"type": "array", "items": {"type": "string"}, "maxItems": MOST_CONDITIONS},
}
FILE = {"schema": {"type": "string", "format": "binary", "description": "A JPEG, PNG or WebP file."}}
BODY = {"required": True, "content": {"application/octet-stream": FILE}}
DESCRIPTION = {"parameters": [K, WHERE], "requestBody": BODY}
STALE = ItemError("index_stale", "the index was made with another bundle of this name and version: build it again")


def add(
    app: FastAPI, service: Service, live: LiveIndex, body_of: Callable[[Request], Awaitable[tuple[bytes, str]]]
) -> None:
    """Add the route. It needs the key of the index's bundle; the image is queued like one to predict.

    Args:
        body_of: returns body and content type of a request, as for /v1/predict.
    """
    digests: WeakKeyDictionary[Bundle, str] = WeakKeyDictionary()

    @app.put("/v1/search", include_in_schema=False)  # curl -T
    @app.post("/v1/search", summary="Find images like one", openapi_extra=DESCRIPTION)
    async def search(request: Request) -> dict[str, Any]:
        service.admit(request)
        index = live.index
        service.check(request, index.about.bundle)  # before the body is read
        number = request.query_params.get("k", "10")
        if not (number.isascii() and number.isdecimal() and len(number) < 4 and 1 <= int(number) <= MOST):
            raise Refusal(ItemError("bad_option", f"k is the number of results: 1 to {MOST}"))
        try:
            among = await asyncio.to_thread(index.matching, request.query_params.getlist("where"))
        except CascadeError as error:
            raise Refusal(ItemError("bad_option", str(error))) from None
        body, kind = await body_of(request)
        asked = await asyncio.to_thread(parse, body, kind, {})
        if isinstance(asked, ItemError):
            raise Refusal(asked)
        bundle = await service.find(index.about.bundle, index.about.version)
        if isinstance(bundle, ItemError):
            raise Refusal(replace(bundle, kind="index_bundle"))
        if bundle not in digests:
            digests[bundle] = await asyncio.to_thread(digest, bundle)
        if digests[bundle] != index.about.digest:
            raise Refusal(STALE)
        (answer,) = await service.answers(request, [asked[0]], index.options())
        if isinstance(answer, ItemError):
            raise Refusal(answer)
        results = await asyncio.to_thread(index.found, answer.embedding, int(number), among)
        request.state.log_fields.update(bundle=answer.bundle, version=answer.version)
        return {"bundle": answer.bundle, "version": answer.version, "mode": answer.mode, "results": results}
