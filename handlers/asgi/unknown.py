"""/v1/unknown: the images that fit no bundle, where the server keeps them. For keys with role=admin."""

import tarfile
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from cascade.engine.results import ItemError
from cascade.engine.unknown import Kept, UnknownImages
from handlers.asgi import ui
from handlers.asgi.middleware import Refusal
from handlers.asgi.service import Service

NEWEST = 60  # images listed
OFF = ItemError("keeping_off", "this server keeps no images that fit no bundle: start it with --keep-unknown FOLDER")
NOT_KEPT = ItemError("no_unknown", "no such image is kept: GET /v1/unknown lists the newest")
BINARY = {"type": "string", "format": "binary"}


def add(app: FastAPI, service: Service) -> None:
    """Add the routes."""

    def opened(request: Request) -> UnknownImages:
        service.administer(request)
        if service.engine.unknown is None:
            raise Refusal(OFF)
        return service.engine.unknown

    @app.get("/v1/unknown", summary="The kept images that fit no bundle: their number, and the newest")
    async def index(request: Request) -> dict[str, Any]:
        unknown = opened(request)
        kept = await run_in_threadpool(unknown.listed)
        return {
            "count": len(kept),
            "bytes": sum(each.bytes for each in kept),
            "most": {"count": unknown.most_images, "bytes": unknown.most_bytes},
            "newest": [{"name": k.name, "time": k.time, "bytes": k.bytes} for k in reversed(kept[-NEWEST:])],
        }

    @app.get(
        "/v1/unknown.tar",
        summary="All kept images, for cascade train --from-unknown",
        response_class=Response,
        responses={200: {"content": {"application/x-tar": {"schema": BINARY}}}},
    )
    async def archive(request: Request) -> Response:
        unknown = opened(request)
        kept = await run_in_threadpool(unknown.listed)
        named = {"Content-Disposition": 'attachment; filename="unknown.tar"'}
        return StreamingResponse(_tar(unknown, kept), headers=ui.HEADERS | named, media_type="application/x-tar")

    @app.get(
        "/v1/unknown/{name}",
        summary="A kept image",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {"schema": BINARY}}}},
    )
    async def picture(request: Request, name: str) -> Response:
        file = await run_in_threadpool(opened(request).read, name)
        if file is None:
            raise Refusal(NOT_KEPT)
        return Response(file, headers=ui.HEADERS, media_type="image/jpeg")


def _tar(unknown: UnknownImages, kept: list[Kept]) -> Iterator[bytes]:
    """A tar archive of the images, one at a time; those that are evicted meanwhile are left out."""
    for each in kept:
        if (file := unknown.read(each.name)) is not None:
            member = tarfile.TarInfo(f"unknown/{each.name}")
            member.size, member.mtime = len(file), int(each.time)
            yield member.tobuf(tarfile.USTAR_FORMAT) + file + bytes(-len(file) % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
