"""A Ray session for our servers and actors, see ``cascade.ray_session``."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cascade import ray_session
from handlers.ray.middleware import ENVIRONMENT

ROOT = Path(__file__).parents[2]
OBJECT_STORE = 128 * 2**20  # bytes; requests do not use it, and parts of a job are a few MB


def running(cpus: int) -> AbstractContextManager[Any]:
    """Start Ray, or connect to a cluster, until the block ends; ``cpus`` is for a cluster started here.

    Raises:
        ExtraError: Ray is not installed.
        RayError: Ray does not start, or no cluster answers at RAY_ADDRESS.
    """
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return ray_session.running(cpus, OBJECT_STORE, {"PYTHONPATH": search, "OMP_WAIT_POLICY": "passive", **ENVIRONMENT})
