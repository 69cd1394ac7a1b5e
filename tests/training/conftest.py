"""What all tests of training share."""

from pathlib import Path

import pytest
import torch

from cascade.kernels.materialize import materialize
from cascade.model import masks
from tests.helpers.training import recipe
from training import heads
from training.cli import Watch
from training.run import Run


@pytest.fixture(autouse=True)
def one_penalty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice of a penalty, which takes most of the time of a short training."""
    if request.module.__name__ != "tests.training.test_heads":
        monkeypatch.setattr(heads, "PENALTIES", (1.0,))


@pytest.fixture(scope="module")
def threads_are_started() -> None:
    """The swap's kernel, when it first runs, sets the number of threads for all; from then on it is the same."""
    run = Run(Path(), recipe(Path()), Watch(None))
    n = run.backbone.weights.numel()
    materialize(run.backbone, masks.Mask("all", 0, masks.pack(torch.ones(n, dtype=torch.bool))))
