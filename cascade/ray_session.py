"""A Ray session for the duration of a command: the cluster at RAY_ADDRESS, or one started on this machine.

Shared by servers and trainers; the engine does not use it.
"""

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cascade.errors import CascadeError, brief
from cascade.extras import library


class RayError(CascadeError):
    """Ray can't start, or no cluster answers at RAY_ADDRESS."""


@contextmanager
def running(
    cpus: int, memory: int, environment: Mapping[str, str] | None = None, *, log_to_driver: bool = True
) -> Iterator[Any]:
    """Yield the module ``ray``, connected, without dashboard and usage reports; shut it down after the block.

    A cluster started here is private. Its processes listen on every address, so they require a random token, which they
    inherit through the environment.

    Args:
        cpus: number of CPUs of a cluster started here.
        memory: bytes of its object store.
        environment: variables of its processes, and of this one until the block ends.
        log_to_driver: print the output of tasks and actors here.

    Raises:
        ExtraError: Ray is not installed.
        RayError: Ray does not start, or no cluster answers at RAY_ADDRESS.
    """
    variables = {"RAY_USAGE_STATS_ENABLED": "0", **(environment or {})}
    local = "RAY_ADDRESS" not in os.environ
    if local:
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables  # Ray reads them when it is imported
    try:
        ray = library("ray")
        # A short path, because it holds sockets, whose paths are limited to 107 bytes.
        with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
            options: dict[str, Any] = {
                "num_cpus": cpus,
                "include_dashboard": False,
                "object_store_memory": memory,
                "_temp_dir": folder,
            }
            try:
                ray.init(logging_level=logging.ERROR, log_to_driver=log_to_driver, **(options if local else {}))
            except Exception as error:
                if local:
                    raise RayError(f"Ray does not start on this machine ({brief(error)})") from error
                address = os.environ["RAY_ADDRESS"]
                raise RayError(f"no Ray cluster answers at {address} ({brief(error)}): see ray status") from error
            try:
                yield ray
            finally:
                ray.shutdown()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
