"""Where the GPU's kernels run: on the GPU, or without one in Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch

from cascade.engine.executors.precision import exact


@pytest.fixture
def device() -> Iterator[str]:
    """The device, with exact references: PyTorch's convolutions take TF32 by default."""
    if torch.cuda.is_available():
        with exact(torch.device("cuda")):
            yield "cuda"
        return
    from triton.runtime.interpreter import InterpretedFunction

    from cascade.kernels import triton

    assert isinstance(triton._masked, InterpretedFunction), "triton was imported before tests/conftest.py"
    yield "cpu"
