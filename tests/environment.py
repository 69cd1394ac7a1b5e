"""Environment of the tests: a pytest plugin (``-p`` in pyproject.toml), loaded before any conftest imports torch.

Importing this module changes nothing.
"""

import os

from tests.helpers.environment import reset


def pytest_load_initial_conftests() -> None:
    """Reset what is inherited, and set what numpy, torch and triton read when they are imported, in children too."""
    reset()
    # On few cores, OpenMP threads that spin while they wait cost minutes.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # The plain executor starts at once. Tests of the other executors name them.
    os.environ["CASCADE_EXECUTOR"] = "plain"
    os.environ |= {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}  # servers of the tests
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # triton's interpreter runs our kernels
