"""POST /v1/search: the images of an index that are most similar to one (``cascade serve --index INDEX``)."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import FastAPI, Request

from cascade.bundle.format import Bundle, digest
from cascade.engine.results import ItemError
from cascade.offline.index import Index, found
from handlers.asgi.middleware import Refusal
from handlers.asgi.service import Service
from handlers.requests import parse

MOST = 100  # results
K = {"name": "k", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": MOST, "default": 10}}
FILE = {"schema": {"type": "string", "format": "binary", "description": "A JPEG, PNG or WebP file."}}
BODY = {"required": True, "content": {"application/octet-stream": FILE}}
STALE = ItemError("index_stale", "the index was made with another bundle of this name and version: build it again")


def add(
    app: FastAPI, service: Service, index: Index, body_of: Callable[[Request], Awaitable[tuple[bytes, str]]]
) -> None:
    """Add the route. It needs the key of the index's bundle; the image is queued like one to predict.

    Args:
        body_of: returns body and content type of a request, as for /v1/predict.
    """
    digests: WeakKeyDictionary[Bundle, str] = WeakKeyDictionary()

    @app.put("/v1/search", include_in_schema=False)  # curl -T
    @app.post("/v1/search", summary="Find images like one", openapi_extra={"parameters": [K], "requestBody": BODY})
    async def search(request: Request) -> dict[str, Any]:
        service.admit(request)
        service.check(request, index.about.bundle)  # before the body is read
        number = request.query_params.get("k", "10")
        if not (number.isascii() and number.isdecimal() and len(number) < 4 and 1 <= int(number) <= MOST):
            raise Refusal(ItemError("bad_option", f"k is the number of results: 1 to {MOST}"))
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
        assert answer.embedding is not None
        results = await asyncio.to_thread(found, index, answer.embedding, int(number))
        request.state.log_fields.update(bundle=answer.bundle, version=answer.version)
        return {"bundle": answer.bundle, "version": answer.version, "mode": answer.mode, "results": results}
