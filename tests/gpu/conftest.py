"""The checks that need a CUDA device.

They skip without one, on CI too and whatever REQUIRE_ALL says: a GPU can't be installed. What can be checked without is
checked elsewhere: the kernels in Triton's interpreter (on a GPU, the same tests run there), and compiled for an H100
(tests/cascade/kernels), the executor with its graphs replaced by tapes (tests/cascade/engine/executors).
"""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"
