"""The ASGI application: requests in, one batcher behind them, answers out. docs/http.md describes the API."""

import asyncio
from collections.abc import Collection
from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from cascade import __version__, metrics
from cascade.bundle.format import Bundle
from cascade.engine.batcher import STOPPING
from cascade.engine.registry import Registry, State
from cascade.engine.results import DISPATCH_MODES, UNKNOWN_CHOICES, ItemError, Options
from cascade.engine.tenants import PRIORITIES
from cascade.offline.index.live import LiveIndex
from cascade.open_inference import LENGTH_HEADER
from handlers.asgi import auto, inside, open_inference, overview, pins, repository, search, ui, unknown
from handlers.asgi.keys import EVERY, FORBIDDEN
from handlers.asgi.middleware import FAILED, Guard, Refusal
from handlers.asgi.service import Service
from handlers.requests import NOT_FINITE, OPTIONS, encode, parse, wants_bytes

JPEG_OR_SO = {"type": "string", "format": "binary", "description": "A JPEG, PNG or WebP file."}
ERROR = {"description": "What is wrong, and what to do.", "content": {"application/json": {}}}
STATUSES: tuple[int | str, ...] = (400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 431, 500, 503)
ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys(STATUSES, ERROR)
VERSION: dict[str, Any] = {
    "parameters": [{"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}]
}
OPTIONS_IN_QUERY = ItemError(
    "bad_request", "a query has no effect: send options as headers (X-Cascade-Mode: ...) or as JSON"
)
V2_QUERY = ItemError(
    "bad_request", "a query has no effect: the version belongs in the path, /v2/models/NAME/versions/VERSION"
)
BAD_FORM = ItemError("bad_request", "send one image per request: a form has exactly one part, the file")
ATTEMPTS = 2  # for a request without a version, if its version is removed meanwhile
CORS_METHODS = ("GET", "POST", "PUT", "DELETE")


def create_app(
    service: Service,
    index: LiveIndex | None = None,
    hosts: Collection[str] | None = None,
    registry: Registry | None = None,
    origins: Collection[str] = (),
) -> Guard:
    """The ASGI application over a service.

    Args:
        index: for /v1/search, which exists only with an index.
        registry: for /v2/repository, which exists only with a registry.
        hosts: the Host headers to accept; None for any.
        origins: of the web pages that may read the answers (CORS).
    """
    app = FastAPI(
        title="Cascade", version=__version__, redoc_url=None, docs_url=None, responses=ERRORS, redirect_slashes=False
    )
    _predictions(app, service)
    if registry is not None:
        repository.add(app, service, registry)
        pins.add(app, service, registry)
    unknown.add(app, service)
    auto.add(app, service)
    _protocol(app, service, registry is not None)
    _state(app, service)
    overview.add(app, service)
    ui.add(app)
    inside.add(app, service)
    if index is not None:
        search.add(app, service, index, _one_body)

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return service.problem(request, refusal.error)

    @app.exception_handler(HTTPException)
    async def nowhere(request: Request, error: HTTPException) -> Response:
        phrase = HTTPStatus(error.status_code).phrase.lower()
        kind = phrase.replace(" ", "_")
        answer = service.problem(request, ItemError(kind, f"{phrase}: /openapi.json has the paths"))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientDisconnect)
    async def hung_up(request: Request, error: ClientDisconnect) -> Response:
        return service.problem(request, ItemError("hung_up", "the client closed the connection before the answer"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return service.problem(request, FAILED)

    @cache
    def described() -> dict[str, Any]:
        """FastAPI's OpenAPI description, plus the body of /infer, which FastAPI does not parse itself."""
        schema = open_inference.InferRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        document["components"] = {"schemas": schema.pop("$defs") | {"InferRequest": schema}}
        return document

    app.openapi = described  # type: ignore[method-assign]
    if not origins:
        return Guard(app, service.limits, hosts)
    cors = CORSMiddleware(app, origins, CORS_METHODS, allow_headers=["*"], expose_headers=["*"])
    return Guard(cors, service.limits, hosts)


def _predictions(app: FastAPI, service: Service) -> None:
    """/v1/predict: one file in, one answer out; headers, JSON and forms are the same as with TorchServe."""
    header = {"in": "header", "required": False, "schema": {"type": "string"}}
    options = [
        {"name": f"X-Cascade-{name}", **header}
        for name in ("Bundle", "Version", "Mode", "Fields", "Priority", "Dispatch", "Unknown")
    ]
    form = {"type": "object", "properties": {"image": JPEG_OR_SO}, "required": ["image"]}
    document = {
        "type": "object",
        "required": ["image"],
        "properties": {
            "image": {"type": "string", "format": "byte", "description": "The file in base64."},
            "fields": {"type": "array", "items": {"enum": ["labels", "neighbors", "embedding"]}},
            "priority": {"enum": [*PRIORITIES]},
            "dispatch": {"enum": [*DISPATCH_MODES]},
            "unknown": {"enum": [*UNKNOWN_CHOICES]},
            **{name: {"type": "string"} for name in ("bundle", "version", "mode")},
        },
    }
    content = {
        "application/octet-stream": {"schema": JPEG_OR_SO},
        "application/json": {"schema": document},
        "multipart/form-data": {"schema": form},
    }
    description = {"parameters": options, "requestBody": {"required": True, "content": content}}

    @app.put("/v1/predict", include_in_schema=False)  # curl -T
    @app.post(
        "/v1/predict", openapi_extra=description, responses=open_inference.JSON_OR_BYTES, summary="Predict one image"
    )
    async def predict(request: Request) -> Response:
        service.admit(request)
        if request.query_params:
            raise Refusal(OPTIONS_IN_QUERY)
        body, kind = await _one_body(request)
        if "json" in kind.lower():  # base64 of any size; the rest is done sooner than a thread would start
            asked = await asyncio.to_thread(parse, body, kind, request.headers)
        else:
            asked = parse(body, kind, request.headers)
        if isinstance(asked, ItemError):
            raise Refusal(asked)
        image, options = asked
        options = service.allowed(request, options)
        (answer,) = await service.answers(request, [image], options)
        if isinstance(answer, ItemError):
            raise Refusal(answer)
        request.state.log_fields.update(bundle=answer.bundle, version=answer.version)
        try:
            text, content_type, headers = encode(answer, wants_bytes(request.headers))
        except ValueError:
            raise Refusal(NOT_FINITE) from None
        return Response(text, headers=headers, media_type=content_type)


def _protocol(app: FastAPI, service: Service, has_repository: bool) -> None:
    """/v2: the Open Inference Protocol."""

    @app.get("/v2", summary="Server metadata")
    async def server() -> dict[str, Any]:
        managed = has_repository and service.keys is not None and service.keys.admins
        extensions = ["binary_tensor_data", "statistics", *(["model_repository"] if managed else [])]
        return {"name": "cascade", "version": __version__, "extensions": extensions}

    @app.get("/v2/models", summary="Bundles and their versions")
    async def models(request: Request) -> dict[str, Any]:
        return {"models": [{"name": name} | _versions(states) for name, states in service.states(request).items()]}

    @app.get("/v2/models/{model}", summary="Bundle metadata")
    @app.get("/v2/models/{model}/versions/{version}", summary="Bundle metadata", openapi_extra=VERSION)
    async def model_metadata(request: Request, model: str) -> dict[str, Any]:
        bundle = await find_bundle(request, model)
        return open_inference.metadata(bundle) | _versions(service.states(request, model).get(model, []))

    @app.get("/v2/models/{model}/ready", summary="Bundle readiness")
    @app.get("/v2/models/{model}/versions/{version}/ready", summary="Bundle readiness", openapi_extra=VERSION)
    async def model_ready(request: Request, model: str) -> dict[str, Any]:
        bundle = await find_bundle(request, model)
        if not service.ready:
            raise Refusal(STOPPING)
        return {"name": bundle.name, "ready": True}

    @app.get("/v2/models/{model}/stats", summary="Statistics of a bundle's versions")
    @app.get("/v2/models/{model}/versions/{version}/stats", summary="Statistics of a bundle", openapi_extra=VERSION)
    async def model_statistics(request: Request, model: str) -> dict[str, Any]:
        bundle = await find_bundle(request, model)
        versions = [v for name, v in service.engine.bundles if name == bundle.name]
        if "version" in request.path_params:
            versions = [bundle.version]
        return {
            "model_stats": [service.batcher.statistics.of(bundle.name, v).to_triton(bundle.name, v) for v in versions]
        }

    shared: dict[str, Any] = {"responses": open_inference.JSON_OR_BYTES, "summary": "Predict images"}

    @app.post("/v2/models/{model}/infer", openapi_extra=open_inference.BODY, **shared)
    @app.post("/v2/models/{model}/versions/{version}/infer", openapi_extra=open_inference.BODY | VERSION, **shared)
    async def infer(request: Request, model: str) -> Response:
        service.admit(request)
        outputs = open_inference.outputs_of(await find_bundle(request, model))  # before the body is read
        body = await request.body()
        most = min(service.limits.images, service.batcher.queue)
        asked = await asyncio.to_thread(open_inference.parse, body, request.headers.get(LENGTH_HEADER), most, outputs)
        for _ in range(ATTEMPTS):
            bundle = await find_bundle(request, model)  # one for all images of the request
            embedding, labels = "embedding" in asked.outputs, asked.labels
            options = Options(model, bundle.version, asked.mode, embedding, labels, 0, asked.priority)
            answers = await service.answers(request, asked.images, options)
            if "version" in request.path_params or not any(
                isinstance(a, ItemError) and a.kind == "unknown_version" for a in answers
            ):
                break
        request.state.log_fields.update(bundle=bundle.name, version=bundle.version, images=len(answers))
        return await open_inference.reply(asked, bundle.identity, answers, bundle.card.dim)

    async def find_bundle(request: Request, model: str) -> Bundle:
        service.check(request, model)
        query = request.query_params.keys()  # if ignored, ?version=1 would be answered by the latest version
        if query if request.method == "POST" else query & set(OPTIONS):
            raise Refusal(V2_QUERY)
        version = request.path_params.get("version")
        bundle = await service.find(model, version)
        if isinstance(bundle, ItemError):
            raise Refusal(bundle)
        return bundle


def _state(app: FastAPI, service: Service) -> None:
    """Health checks and metrics."""

    @app.get("/v2/health/live", summary="The process answers")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="Every bundle is loaded and new work is taken")
    async def ready() -> Response:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
    async def scrape(request: Request) -> Response:
        if EVERY not in service.opened(request):  # its labels are the names of all bundles
            raise Refusal(FORBIDDEN)
        return Response(await asyncio.to_thread(metrics.scrape), media_type="text/plain; version=0.0.4")


def _versions(states: list[State]) -> dict[str, Any]:
    """The versions that can answer, and the state of every version in the store."""
    state = {s.version: {"state": s.state} | ({"reason": s.reason} if s.reason else {}) for s in states}
    return {"versions": [s.version for s in states if s.state in ("ready", "stored")], "state": state}


class _InMemory(MultiPartParser):
    """Parses forms in memory. Starlette would spool files over 1 MB to disk, which may be full; bodies are bounded."""

    spool_max_size = 2**40


async def _one_body(request: Request) -> tuple[bytes, str]:
    """The body and its content type; for a form, those of its only part."""
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        return await request.body(), kind
    try:
        form = await _InMemory(request.headers, request.stream(), max_files=1, max_fields=1).parse()
    except (MultiPartException, LookupError):
        raise Refusal(BAD_FORM) from None
    try:
        if len(form.multi_items()) != 1:
            raise Refusal(BAD_FORM)
        ((_, part),) = form.multi_items()
        return (part.encode() if isinstance(part, str) else await part.read()), "application/octet-stream"
    finally:
        await form.close()
