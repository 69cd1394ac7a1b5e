"""What the routes share: the batcher, who may use which bundle, and errors as responses."""

import asyncio
import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from torch import Tensor

from cascade import metrics
from cascade.engine.batcher import DEADLINE, OVERLOADED, STOPPING, Answer, Batcher
from cascade.engine.registry import State
from cascade.engine.results import ItemError, Options
from handlers.asgi.keys import EVERY, FORBIDDEN, Keys
from handlers.asgi.middleware import LIMITS, Limits, Refusal
from handlers.statuses import error_body, status_of


class States(Protocol):
    """Knows what there is in the store: a ``cascade.engine.registry.Registry``, or what stands in for one."""

    def states(self, name: str | None = None) -> list[State]: ...


class Service:
    """What the routes share.

    Attributes:
        stopping: new work is refused, what is in progress goes on.
    """

    def __init__(
        self, batcher: Batcher, keys: Keys | None = None, limits: Limits = LIMITS, registry: States | None = None
    ) -> None:
        self.batcher, self.engine, self.keys, self.limits = batcher, batcher.engine, keys, limits
        self.registry = registry
        self.stopping = False
        self._images = 0  # in `answers`
        self._decoding = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "cascade-decode")

    @property
    def ready(self) -> bool:
        return bool(self.engine.bundles) and not self.stopping and self.batcher.alive

    def admit(self, request: Request) -> None:
        """Raise Refusal where the body need not even be read: the server stops, or the caller has no key."""
        if self.stopping:
            raise Refusal(STOPPING)
        self.opened(request)

    def check(self, request: Request, bundle: str | None) -> None:
        """Raise Refusal unless the caller may use the bundle (None: the only one there is)."""
        opened = self.opened(request)
        if EVERY not in opened and (bundle or self._only()) not in opened:
            raise Refusal(FORBIDDEN)

    def opened(self, request: Request) -> frozenset[str]:
        """The bundles that the caller may use; ``*`` stands for all."""
        if self.keys is None:
            return frozenset((EVERY,))
        opened = self.keys.allowed(request.headers.get("authorization"))
        if isinstance(opened, ItemError):
            raise Refusal(opened)
        return opened

    def states(self, request: Request, name: str | None = None) -> dict[str, list[State]]:
        """Of every bundle that the caller may use (or the one called ``name``), versions rising, refused ones too."""
        if self.registry is not None:
            known = self.registry.states(name)
        else:
            known = [State(*each, "ready") for each in self.engine.bundles if name in (None, each[0])]
        opened, found = self.opened(request), dict[str, list[State]]()
        for state in known:
            if EVERY in opened or state.name in opened:
                found.setdefault(state.name, []).append(state)
        return found

    async def answers(self, request: Request, images: list[bytes | Tensor], options: Options) -> list[Answer]:
        """Decoded in a pool, answered in the batcher's passes; given up when the client hangs up or time is over."""
        if self._images + len(images) > self.batcher.queue + self.batcher.max_batch:
            metrics.DROPPED.labels(OVERLOADED.kind).inc(len(images))
            raise Refusal(OVERLOADED)
        seconds = self.limits.answer_seconds
        end = time.monotonic() + seconds

        def submit(image: bytes | Tensor) -> "Future[Answer]":
            return self.batcher.submit(image, options, end - time.monotonic())

        async def answer(image: bytes | Tensor) -> Answer:
            future = await asyncio.get_running_loop().run_in_executor(self._decoding, submit, image)
            return await asyncio.wrap_future(future)

        self._images += len(images)
        answered, gone = asyncio.gather(*map(answer, images)), asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait((answered, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if answered.done():
                return answered.result()
            raise ClientDisconnect if gone.done() else Refusal(DEADLINE)
        finally:
            self._images -= len(images)
            answered.cancel()  # what is in no pass yet costs none
            gone.cancel()

    def problem(self, request: Request, error: ItemError) -> Response:
        """An error as a response: an object for /v1, a text under "error" where the v2 protocol wants one."""
        request.scope["state"]["about"]["error"] = error.kind
        headers = {}
        status = status_of(error)
        if status == 503:
            headers["Retry-After"] = str(max(1, math.ceil(self.batcher.retry_after())))
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if status in (408, 413) or error is STOPPING:
            headers["Connection"] = "close"
        text = request.url.path.startswith("/v2")
        body = {"error": f"{error.kind}: {error.message}"} if text else error_body(error)
        return JSONResponse(body, status, headers)

    def close(self) -> None:
        self._decoding.shutdown()

    def _only(self) -> str | None:
        names = {name for name, _ in self.engine.bundles}
        return next(iter(names)) if len(names) == 1 else None


async def _hung_up(request: Request) -> None:
    """Ends when the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
