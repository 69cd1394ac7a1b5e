"""``cascade serve --frontend ray``: Serve with its proxies and replicas, on this machine or on a cluster that runs.

RAY_ADDRESS names a cluster. Without one Ray is started here, for as long as the server runs, and closed to others: its
processes talk over TCP, and take a random token from each other that goes by the environment.
"""

import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from cascade.errors import CascadeError
from handlers.ray.proxy import ENVIRONMENT

ROOT = Path(__file__).parents[2]
OBJECT_STORE = 80 * 2**20
"""Bytes: Ray's least. Requests go past the object store."""


def serve(
    model_store: Path | str,
    host: str = "127.0.0.1",
    port: int = 8080,
    replicas: int = 1,
    api_keys: Path | None = None,
    drain_timeout: float = 8,
    pins: Mapping[str, str] | None = None,
    log_level: str = "info",
    **settings: Any,
) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C, then return.

    Args:
        replicas: at most; there are as many as the requests in progress call for, 16 to a replica.
        drain_timeout: seconds for the requests in progress to finish.
        settings: others of ``handlers.ray.replica.Settings``.

    Raises:
        CascadeError: Ray is not installed or does not start, or no replica comes up.
    """
    stop = threading.Event()

    def stopped(number: int, frame: FrameType | None) -> None:
        stop.set()

    with ExitStack() as stack:
        for each in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, each, signal.signal(each, stopped))
        metrics = stack.enter_context(tempfile.TemporaryDirectory(prefix="cascade-metrics-"))
        stack.enter_context(running(replicas + 2))
        from ray import serve as ray_serve

        from handlers.ray.replica import Settings, build

        where = str(model_store) if "://" in str(model_store) else str(Path(model_store).resolve())
        keys = None if api_keys is None else str(api_keys.resolve())
        asked = Settings(model_store=where, api_keys=keys, pins=dict(pins or {}), log_level=log_level, **settings)
        application = build(asked).options() if False else build(asked)
        ray_serve.start(http_options={"host": host, "port": port})
