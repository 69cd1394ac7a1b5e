"""TorchDynamo is no part of what a server loads, and still there for who needs it."""

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

PROGRAM = """
import sys, cascade.engine.engine
assert "timm" in sys.modules and "torch._dynamo" not in sys.modules
import torch
assert torch.compiler.disable(len)("four") == 4
assert torch._dynamo.__file__ and torch._dynamo.utils.is_compile_supported("cpu")
"""


@pytest.mark.slow
def test_the_engine_loads_no_dynamo_until_somebody_needs_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
