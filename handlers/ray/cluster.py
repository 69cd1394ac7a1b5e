"""Ray with what our servers and actors want of it, see ``cascade.ray_session``."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cascade import ray_session
from handlers.ray.middleware import ENVIRONMENT

ROOT = Path(__file__).parents[2]
OBJECT_STORE = 128 * 2**20  # bytes; requests go past it, and parts of a job are a few MB


def running(cpus: int) -> AbstractContextManager[Any]:
    """Ray until the block ends; ``cpus`` are those of a machine that is started here.

    Raises:
        RayError: it is not installed, does not start, or RAY_ADDRESS leads nowhere.
    """
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return ray_session.running(cpus, OBJECT_STORE, {"PYTHONPATH": search, "OMP_WAIT_POLICY": "passive", **ENVIRONMENT})
