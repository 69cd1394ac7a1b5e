"""/v2/models/auto: the Open Inference Protocol with dispatch; each image goes to the bundle that it fits best."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response

from cascade.engine.results import AUTO, ItemError, Options, Prediction
from cascade.open_inference import AUTO_OUTPUTS, LENGTH_HEADER
from handlers.asgi import open_inference
from handlers.asgi.middleware import Refusal
from handlers.asgi.service import Service

SEVERAL_WIDTHS = ItemError(
    "bad_request", "these bundles have embeddings of different widths: omit the output embedding, or name a bundle"
)


def add(app: FastAPI, service: Service) -> None:
    """Add the routes of the model ``auto``."""

    @app.get(f"/v2/models/{AUTO}", summary="Metadata of the model that dispatches")
    async def metadata(request: Request) -> dict[str, Any]:
        await check_table(request)
        return {
            "name": AUTO,
            "versions": ["1"],
            "platform": "cascade",
            "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [{"name": n, "datatype": t, "shape": [-1]} for n, t in AUTO_OUTPUTS.items()],
        }

    @app.get(f"/v2/models/{AUTO}/ready", summary="Whether images can be dispatched")
    async def ready(request: Request) -> dict[str, Any]:
        await check_table(request)
        return {"name": AUTO, "ready": True}

    @app.post(
        f"/v2/models/{AUTO}/infer",
        summary="Predict images, each by the bundle that it fits",
        openapi_extra=open_inference.BODY,
        responses=open_inference.JSON_OR_BYTES,
    )
    async def infer(request: Request) -> Response:
        service.admit(request)
        await check_table(request)
        body = await request.body()
        most = min(service.limits.images, service.batcher.queue)
        length = request.headers.get(LENGTH_HEADER)
        asked = await asyncio.to_thread(open_inference.parse, body, length, most, AUTO_OUTPUTS)
        embedding, labels = "embedding" in asked.outputs, asked.labels
        wanted = Options(
            AUTO, None, asked.mode, embedding, labels, 0, asked.priority, asked.dispatch, unknown=asked.unknown
        )
        options = service.allowed(request, wanted)
        answers = await service.answers(request, asked.images, options)
        request.state.log_fields.update(bundle=AUTO, images=len(answers))
        widths = {len(a.embedding) for a in answers if isinstance(a, Prediction) and a.embedding is not None}
        if len(widths) > 1:
            raise Refusal(SEVERAL_WIDTHS)
        return await open_inference.reply(asked, (AUTO, "1"), answers, next(iter(widths), 0))

    async def check_table(request: Request) -> None:
        """Check that there is a bundle to dispatch to, before the body is read."""
        service.opened(request)
        found = await asyncio.to_thread(service.engine.dispatch_table)  # half a second for a thousand new bundles
        if isinstance(found, ItemError):
            raise Refusal(found)
