"""What can be said without a cluster; tests/e2e starts Ray."""

import os
import sys

import pytest

from cascade.extras import ExtraError
from cascade.ray_session import running


def test_without_ray_one_line_says_so_and_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    before = dict(os.environ)
    for environment in (None, {"OMP_WAIT_POLICY": "passive", "CASCADE_NEW": "1"}):
        with pytest.raises(ExtraError, match="pip install 'cascade-vision"), running(1, 2**20, environment):
            pytest.fail("Ray is not there")
        assert dict(os.environ) == before
