"""What all tests of training share."""

import pytest

from training import heads


@pytest.fixture(autouse=True)
def one_penalty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice of a penalty, which takes most of the time of a short training."""
    if request.module.__name__ != "tests.training.test_heads":
        monkeypatch.setattr(heads, "PENALTIES", (1.0,))
