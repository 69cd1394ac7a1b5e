"""TorchDynamo is no part of what a server loads, and still there for who needs it."""

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

NOT_LOADED = """
import sys, cascade.engine.engine
from cascade.engine.executors.onnx import _shapes
from cascade.model import backbone, folding
for name, size, last in (("tf_efficientnet_lite0", 64, (1280, 2, 2)), ("test_vit", 160, (101, 64))):
    shapes = _shapes(folding.Folded(backbone.load(name, "random:0")), size)
    assert shapes[-1] == last, shapes
assert "timm" in sys.modules and "torch._dynamo" not in sys.modules
"""
NEEDED = """
import sys
class More:
    def find_spec(self, name, *_):
        if name == "timm.models":
            sys.meta_path.remove(self)
            raise ImportError("a version that needs more of TorchDynamo")
sys.meta_path.insert(0, More())
import cascade.model.backbone, timm
assert timm.layers.Conv2dSame and timm.models.ResNet and "torch._dynamo" in sys.modules
"""
REAL = """
import torch
assert torch.compiler.disable(len)("four") == 4
assert torch._dynamo.__file__ and torch._dynamo.utils.is_compile_supported("cpu")
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [NOT_LOADED, NEEDED], ids=["not loaded", "needed"])
def test_dynamo_is_loaded_when_somebody_needs_it(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program + REAL], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
