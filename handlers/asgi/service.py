"""Shared by all routes: the batcher, access to bundles, and errors as responses."""

import asyncio
import math
from dataclasses import replace
from typing import Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from torch import Tensor

from cascade import tracing
from cascade.bundle.bundle import Bundle
from cascade.engine.batcher import STOPPING, Answer, Batcher
from cascade.engine.registry import State
from cascade.engine.results import AUTO, ItemError, Options
from handlers.asgi.keys import EVERY, FORBIDDEN, Caller, Keys
from handlers.asgi.middleware import LIMITS, Limits, Refusal
from handlers.requests import COMPRESSED, is_compressed
from handlers.statuses import error_body, status_of

NO_ADMIN = ItemError("management_off", "no key of this server may change what is served: give one role=admin")
NOT_ADMIN = ItemError("key_not_admin", "this API key may not change what is served: use one with role=admin")


class States(Protocol):
    """Knows the state of every bundle in the store, as ``cascade.engine.registry.Registry`` does."""

    def states(self, name: str | None = None) -> list[State]: ...


class Service:
    """State and checks shared by the routes.

    Attributes:
        stopping: new requests are refused, those in progress are answered.
    """

    def __init__(
        self, batcher: Batcher, keys: Keys | None = None, limits: Limits = LIMITS, registry: States | None = None
    ) -> None:
        self.batcher, self.engine, self.keys, self.limits = batcher, batcher.engine, keys, limits
        self.registry = registry
        self.stopping = False

    @property
    def ready(self) -> bool:
        serves = bool(self.engine.names) or self.engine.on_missing is not None
        return serves and not self.stopping and self.batcher.alive

    def admit(self, request: Request) -> None:
        """Raise Refusal before the body is read if the server stops, the body is compressed, or the key is missing."""
        if self.stopping:
            raise Refusal(STOPPING)
        if is_compressed(request.headers):
            raise Refusal(COMPRESSED)
        self.opened(request)

    def check(self, request: Request, bundle: str | None) -> None:
        """Raise Refusal unless the caller may use the bundle (None: the only one)."""
        opened = self.opened(request)
        if EVERY not in opened and (bundle or self.engine.only) not in opened:
            raise Refusal(FORBIDDEN)

    def allowed(self, request: Request, options: Options) -> Options:
        """Restrict options to the caller's bundles: an image without a bundle's name is dispatched among those.

        This applies even with a single bundle, since another one may be loaded before the image is decoded.

        Raises:
            Refusal: the caller may not use the bundle.
        """
        if options.bundle != AUTO and (options.bundle is not None or self.engine.only is not None):
            self.check(request, options.bundle)
        opened = self.opened(request)
        return options if EVERY in opened else replace(options, among=opened)

    def opened(self, request: Request) -> frozenset[str]:
        """The bundles that the caller may use; ``*`` stands for all. Records the request's tenant."""
        if self.keys is None:
            return frozenset((EVERY,))
        return self._caller(request, self.keys).bundles

    def administer(self, request: Request) -> None:
        """Raise Refusal unless the caller may change what is served."""
        if self.keys is None or not self.keys.admins:
            raise Refusal(NO_ADMIN)
        if not self._caller(request, self.keys).admin:
            raise Refusal(NOT_ADMIN)

    async def find(self, name: str, version: str | None = None) -> Bundle | ItemError:
        """``Engine.find``; an on-demand bundle is loaded in a thread."""
        if self.engine.is_cold(name):
            with tracing.loading(name):
                return await asyncio.to_thread(self.engine.find, name, version)
        return self.engine.find(name, version)

    def states(self, request: Request, name: str | None = None) -> dict[str, list[State]]:
        """The versions, ascending, of every bundle that the caller may use (or of ``name``), refused ones too."""
        if self.registry is not None:
            known = self.registry.states(name)
        else:
            known = [State(n, version, "ready") for n, version in self.engine.bundles if name in (None, n)]
        opened = self.opened(request)
        states: dict[str, list[State]] = {}
        for state in known:
            if EVERY in opened or state.name in opened:
                states.setdefault(state.name, []).append(state)
        return states

    async def answers(self, request: Request, images: list[bytes | Tensor], options: Options) -> list[Answer]:
        """The batcher's answers; cancelled when the client closes the connection."""
        tenant = getattr(request.state, "tenant", None)
        answered = asyncio.ensure_future(self.batcher.answers(images, options, self.limits.answer_seconds, tenant))
        closed = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((answered, closed), return_when=asyncio.FIRST_COMPLETED)
            if answered.done():
                return answered.result()
            answered.cancel()
            await asyncio.wait([answered])  # its images leave the queue before the request ends
            raise ClientDisconnect
        finally:
            answered.cancel()
            closed.cancel()

    def problem(self, request: Request, error: ItemError) -> Response:
        """An error as a response: an object for /v1, a string under "error" for the v2 protocol."""
        request.scope["state"]["log_fields"]["error"] = error.kind
        headers = {}
        status = status_of(error)
        if status in (429, 503):
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or self.batcher.retry_after())))
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if status in (408, 413) or error is STOPPING:
            headers["Connection"] = "close"
        return JSONResponse(error_body(error, request.url.path), status, headers)

    def _caller(self, request: Request, keys: Keys) -> Caller:
        caller = keys.caller(request.headers.get("authorization"))
        if isinstance(caller, ItemError):
            raise Refusal(caller)
        request.state.log_fields["tenant"] = caller.tenant.name
        request.state.tenant = caller.tenant
        return caller


async def _disconnected(request: Request) -> None:
    """Return when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
