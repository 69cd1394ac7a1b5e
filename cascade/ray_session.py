"""Ray for as long as a command runs: a cluster that is there already (RAY_ADDRESS names it), or one on this machine.

For servers and trainers, which do not know each other. The engine knows nothing of it.
"""

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cascade.errors import CascadeError, brief


class RayError(CascadeError):
    """Ray is not there, or does not start."""


@contextmanager
def running(
    cpus: int, memory: int, environment: Mapping[str, str] | None = None, *, log_to_driver: bool = True
) -> Iterator[Any]:
    """Ray, as a module, until the block ends, without dashboard and usage reports.

    One that is started here is closed to others: its processes listen on every address, and take a random token from
    each other that goes by the environment.

    Args:
        cpus: of the machine that is started here, as Ray counts them.
        memory: bytes of its object store.
        environment: variables of its processes, and of this one until the block ends.
        log_to_driver: whether what tasks and actors print is printed here.

    Raises:
        RayError: it is not installed, does not start, or RAY_ADDRESS leads nowhere.
    """
    ours = {"RAY_USAGE_STATS_ENABLED": "0", **(environment or {})}
    here = "RAY_ADDRESS" not in os.environ
    if here:
        ours |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ |= ours  # before Ray is imported: that is when it looks
    try:
        try:
            import ray
        except ImportError as error:
            raise RayError("Ray is not installed: pip install 'cascade-vision[ray]'") from error
        # Short: sockets lie in it, whose names may have 107 bytes.
        with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
            options: dict[str, Any] = {
                "num_cpus": cpus,
                "include_dashboard": False,
                "object_store_memory": memory,
                "_temp_dir": folder,
            }
            try:
                ray.init(logging_level=logging.ERROR, log_to_driver=log_to_driver, **(options if here else {}))
            except Exception as error:
                where = os.environ.get("RAY_ADDRESS", "this machine")
                raise RayError(f"Ray does not start on {where} ({brief(error)}): see ray status") from error
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
