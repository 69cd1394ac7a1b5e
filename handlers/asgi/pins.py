"""/v2/repository/models/NAME/pin: the versions that answer requests without one. For keys with role=admin."""

import asyncio
import logging

from fastapi import FastAPI, Request

from cascade.engine.registry import Registry
from cascade.engine.results import ItemError
from cascade.errors import CascadeError
from handlers.asgi.middleware import Refusal
from handlers.asgi.repository import UNKNOWN, small_json
from handlers.asgi.service import Service

log = logging.getLogger("cascade.repository")
PATH = "/v2/repository/models/{model}/pin"
NO_PIN = ItemError("bad_request", 'send {"pin": "3"} for one version, or {"pin": "1:95,2:5"} for several by weight')
CONTENT = {"application/json": {"schema": {"type": "object", "properties": {"pin": {"type": "string"}}}}}


def add(app: FastAPI, service: Service, registry: Registry) -> None:
    """Add the routes over the registry of the service's engine."""

    def check(request: Request, model: str) -> None:
        service.administer(request)
        if not registry.states(model):
            raise Refusal(UNKNOWN)

    def current(model: str) -> dict[str, str | None]:
        pin = service.engine.pins.get(model)
        return {"name": model, "pin": None if pin is None else pin.text}

    async def change(request: Request, model: str, text: str | None) -> dict[str, str | None]:
        log.warning("pin %s to %s: asked for by %s", model, text or "its latest version", request.state.tenant.name)
        try:
            await asyncio.to_thread(registry.pin, model, text)
        except CascadeError as error:
            raise Refusal(ItemError("bad_request", str(error))) from None
        return current(model)

    @app.get(PATH, summary="The pin of a bundle")
    async def show(request: Request, model: str) -> dict[str, str | None]:
        check(request, model)
        return current(model)

    @app.put(
        PATH, summary="Pin a bundle to a version, or to several", openapi_extra={"requestBody": {"content": CONTENT}}
    )
    async def pin(request: Request, model: str) -> dict[str, str | None]:
        check(request, model)
        text = small_json(await request.body()).get("pin")
        if not isinstance(text, str):
            raise Refusal(NO_PIN)
        return await change(request, model, text)

    @app.delete(PATH, summary="Remove the pin of a bundle: its latest version answers")
    async def unpin(request: Request, model: str) -> dict[str, str | None]:
        check(request, model)
        return await change(request, model, None)
