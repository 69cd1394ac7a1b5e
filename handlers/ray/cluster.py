"""Ray for as long as a command runs: a cluster that is there already (RAY_ADDRESS names it), or one on this machine."""

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cascade.errors import CascadeError, brief
from handlers.ray.proxy import ENVIRONMENT

ROOT = Path(__file__).parents[2]
OBJECT_STORE = 128 * 2**20  # bytes; requests go past it, and parts of a job are a few MB


class RayError(CascadeError):
    """Ray is not there, or does not start."""


@contextmanager
def running(cpus: int, memory: int = OBJECT_STORE) -> Iterator[None]:
    """Ray until the block ends, without dashboard and usage reports.

    One that is started here is closed to others: its processes listen on every address, and take a random token from
    each other that goes by the environment.

    Args:
        cpus: of the machine that is started here, as Ray counts them.
        memory: bytes of its object store.

    Raises:
        RayError: it is not installed, does not start, or RAY_ADDRESS leads nowhere.
    """
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    ours = {"PYTHONPATH": search, "RAY_USAGE_STATS_ENABLED": "0", "OMP_WAIT_POLICY": "passive", **ENVIRONMENT}
    here = "RAY_ADDRESS" not in os.environ
    if here:
        ours |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ |= ours  # before Ray is imported: that is when it looks
    try:
        import ray
    except ImportError as error:
        raise RayError("Ray is not installed: pip install 'cascade-vision[ray]'") from error
    try:
        # Short: sockets lie in it, whose names may have 107 bytes.
        with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
            options: dict[str, Any] = {
                "num_cpus": cpus,
                "include_dashboard": False,
                "object_store_memory": memory,
                "_temp_dir": folder,
            }
            try:
                ray.init(logging_level=logging.ERROR, **(options if here else {}))
            except Exception as error:
                where = os.environ.get("RAY_ADDRESS", "this machine")
                raise RayError(f"Ray does not start on {where} ({brief(error)}): see ray status") from error
            try:
                yield
            finally:
                ray.shutdown()
    finally:
        for name, value in before.items():
            with suppress(KeyError):
                del os.environ[name]
            if value is not None:
                os.environ[name] = value
