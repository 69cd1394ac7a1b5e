"""The ASGI application as a Ray Serve deployment. Each replica has an engine and a batcher.

``serve run deploy/ray/serve.yaml`` builds it from ``handlers.ray.replica:build``, ``cascade serve --frontend ray`` from
options.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from ray import serve
from ray.serve import Application, Deployment

from cascade import tracing
from cascade.engine.batcher import PASS_TIMEOUT, Batcher
from cascade.engine.engine import Engine
from cascade.engine.on_demand import OnDemandRegistry
from cascade.engine.stores import load_store
from cascade.garbage import exempt_loaded
from cascade.logs import log_to_stderr
from handlers.asgi import key_file
from handlers.asgi.app import create_app
from handlers.asgi.service import Service
from handlers.asgi.watched import Watched
from handlers.ray.middleware import App
from handlers.ray.multiplexing import telling
from handlers.settings import check_origins

TARGET = 16
"""Requests in progress per replica above which Serve starts another one."""


class Settings(BaseModel):
    """Settings of the replicas: the options of ``cascade serve``, and the Host headers to accept (None for any).

    They don't know the address that Serve's proxies listen on, so access without keys must be chosen.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model_store: str = "model_store"
    budget_bytes: PositiveInt | None = None
    memory_bytes: PositiveInt | None = None
    device: str = "cpu"
    threads: PositiveInt | None = None
    max_batch: PositiveInt = 32
    patience: float = Field(default=0.05, ge=0)
    queue: PositiveInt = 256
    time_slice: float = Field(default=0.05, ge=0)
    on_demand: bool = False
    keep_unknown: str | None = None
    keep_images: PositiveInt = 2000
    keep_bytes: PositiveInt = 2**28
    api_keys: str | None = None
    no_auth: bool = False
    hosts: list[str] | None = None
    cors_origins: list[str] = []
    pins: dict[str, str] = {}
    poll: float = Field(default=10, ge=0)
    log_level: str = "info"

    @model_validator(mode="after")
    def _check_access(self) -> Self:
        if self.api_keys is None and self.hosts is None and not self.no_auth:
            raise ValueError("set api_keys; or hosts, for loopback; or no_auth: true, to give everyone access")
        check_origins(self.cors_origins)
        return self


class Replica:
    """An engine behind the ASGI application.

    Raises:
        CascadeError: no bundle can be loaded, or the keys can't be read.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        # Ray gives OpenMP as many threads as the replica has CPUs; numba would start one per core of the machine.
        os.environ.setdefault("NUMBA_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        self._stack = ExitStack()
        log_to_stderr(settings.log_level)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        if tracing.start():
            self._stack.callback(tracing.stop)
        self._keys = None if settings.api_keys is None else Watched(key_file.read, Path(settings.api_keys))
        memory, most = settings.memory_bytes, settings.max_batch
        engine = Engine(settings.budget_bytes, settings.device, memory_bytes=memory, max_batch=most)
        registry = load_store(engine, settings.model_store, settings.pins, on_demand=settings.on_demand)
        keeping = engine.keeping_unknown(settings.keep_unknown, settings.keep_images, settings.keep_bytes)
        self._stack.enter_context(keeping)
        batching: dict[str, Any] = {
            "max_batch": settings.max_batch,
            "patience": settings.patience,
            "queue": settings.queue,
            "time_slice": settings.time_slice,
        }
        self._batcher = self._stack.enter_context(Batcher(engine, **batching))
        self._stack.enter_context(registry.watching(settings.poll))
        opened = None if self._keys is None else self._keys.value
        self._service = Service(self._batcher, opened, registry=registry)
        guard = create_app(self._service, hosts=settings.hosts, origins=settings.cors_origins)
        self._application: App = telling(guard, registry) if isinstance(registry, OnDemandRegistry) else guard
        exempt_loaded()

    def __serve_build_asgi_app__(self) -> App:
        """Called by Serve: the application that it sends requests to."""
        return self._application

    def check_health(self) -> None:
        """Called by Serve every few seconds: it replaces a replica that raises."""
        if self._keys is not None:
            self._service.keys = self._keys.refresh()
        if not self._batcher.alive:
            raise RuntimeError("the batcher has ended")
        if self._batcher.pass_seconds > PASS_TIMEOUT:
            raise RuntimeError(f"a pass has been running for {PASS_TIMEOUT:g} s")

    def __del__(self) -> None:
        """Stop the batcher and the watch over the store. Serve's documented hook for the end of a replica."""
        self._stack.close()


DEPLOYMENT: Deployment = serve.deployment(
    name="cascade",
    autoscaling_config={"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": TARGET},
    max_ongoing_requests=128,
    max_queued_requests=512,
    graceful_shutdown_timeout_s=35,  # an answer takes at most 30
    health_check_period_s=5,
    max_constructor_retry_count=3,
)(serve.ingress()(Replica))


def build(settings: Settings) -> Application:
    """The application for ``serve run``; its arguments are the settings."""
    return DEPLOYMENT.bind(settings)
