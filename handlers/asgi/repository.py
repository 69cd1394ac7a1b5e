"""/v2/repository: Triton's model repository extension, and the upload of packed bundles. For keys with role=admin."""

import asyncio
import json
import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from cascade.bundle.archive import unpack_bytes
from cascade.bundle.bundle import BundleError
from cascade.bundle.files import NAME
from cascade.engine.registry import Registry, State
from cascade.engine.results import ItemError
from handlers.asgi.middleware import Refusal
from handlers.asgi.service import Service

log = logging.getLogger("cascade.repository")
STATES = {"ready": "READY", "stored": "READY", "loading": "LOADING", "refused": "UNAVAILABLE", "removed": "UNAVAILABLE"}
UNLOADED = "unloaded"
PARAMETERS = ItemError("bad_request", "parameters are not taken: send a packed bundle with PUT .../versions/VERSION")
BAD_NAME = ItemError(
    "bad_request", "a bundle's name and version are letters, digits and ._- and begin with none of ._-"
)
EXISTS = ItemError("version_exists", "the store has this version, and versions are never overwritten: choose the next")
IS_URL = ItemError("store_not_writable", "the store is a URL: put the bundle there by its own means")
UNKNOWN = ItemError("unknown_bundle", "no such bundle in the store: POST /v2/repository/index lists them")
PACKED = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


def add(app: FastAPI, service: Service, registry: Registry) -> None:
    """Add the routes over the registry of the service's engine."""

    @app.post("/v2/repository/index", summary="Every bundle of the store and its state")
    async def index(request: Request) -> list[dict[str, str]]:
        service.administer(request)
        asked = small_json(await request.body())
        return [_entry(s, registry) for s in registry.states() if STATES[s.state] == "READY" or not asked.get("ready")]

    @app.post("/v2/repository/models/{model}/load", summary="Load a bundle, or try again")
    async def load(request: Request, model: str) -> Response:
        service.administer(request)
        if small_json(await request.body()).get("parameters"):
            raise Refusal(PARAMETERS)
        log.warning("load %s: asked for by %s", model, request.state.tenant.name)
        states = await asyncio.to_thread(registry.load, model)
        if not states:
            raise Refusal(UNKNOWN)
        if all(s.state != "ready" for s in states):
            why = "; ".join(f"version {s.version}: {s.reason or s.state}" for s in states)
            raise Refusal(ItemError("load_failed", f"no version could be loaded: {why}"))
        return JSONResponse({})

    @app.post("/v2/repository/models/{model}/unload", summary="Unload a bundle; the store keeps it")
    async def unload(request: Request, model: str) -> Response:
        service.administer(request)
        await request.body()
        if not registry.states(model):
            raise Refusal(UNKNOWN)
        log.warning("unload %s: asked for by %s", model, request.state.tenant.name)
        await asyncio.to_thread(registry.unload, model)
        return JSONResponse({})

    _add_upload(app, service, registry)


def _add_upload(app: FastAPI, service: Service, registry: Registry) -> None:
    """Add the atomic upload of packed bundles: they are verified before they get a name in the store."""
    uploading = asyncio.Lock()  # one at a time: an archive may expand to a multiple of its size

    @app.put(
        "/v2/repository/models/{model}/versions/{version}",
        summary="Put a packed bundle into the store and load it",
        openapi_extra={"requestBody": {"required": True, **PACKED}},
    )
    async def upload(request: Request, model: str, version: str) -> dict[str, str]:
        service.administer(request)
        if not (NAME.fullmatch(model) and NAME.fullmatch(version)):
            raise Refusal(BAD_NAME)
        if registry.store.folder is None:
            raise Refusal(IS_URL)
        folder = registry.store.folder / model / version
        if folder.exists():
            raise Refusal(EXISTS)
        raw = await request.body()
        log.warning("upload %s/%s, %d bytes: asked for by %s", model, version, len(raw), request.state.tenant.name)
        async with uploading:
            try:
                await asyncio.to_thread(unpack_bytes, raw, folder, "the body")
            except BundleError as error:
                ours = isinstance(error.__cause__, OSError)
                kind = "store_not_writable" if ours else "version_exists" if folder.exists() else "bad_bundle"
                raise Refusal(ItemError(kind, registry.store.public(str(error)))) from None
            states = await asyncio.to_thread(registry.load, model)
        return next(_entry(s, registry) for s in states if s.version == version)


def _entry(state: State, registry: Registry) -> dict[str, str]:
    reason = UNLOADED if state.name in registry.unloaded else state.reason or ""
    return {"name": state.name, "version": state.version, "state": STATES[state.state], "reason": reason}


def small_json(body: bytes) -> dict[str, Any]:
    """Parse a small JSON object; an empty body is an empty object."""
    try:
        found = json.loads(body) if body and len(body) < 2**16 else {} if not body else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refusal(ItemError("bad_request", "the body is a small JSON object, or empty"))
    return found
