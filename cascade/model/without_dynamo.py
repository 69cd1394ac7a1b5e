"""Import timm without TorchDynamo, which takes three quarters of its import and is not used here.

timm and torchvision need two of its functions while they are imported, and call neither: one marks code that
``torch.compile`` must not trace, the other asks whether a device can compile. A later import of TorchDynamo is real.
"""

import sys
from importlib import import_module
from types import ModuleType

import torch  # noqa: F401  # before the stand-ins


def _import_timm() -> None:
    dynamo, utils = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
    vars(dynamo)["disable"] = lambda function, *_, **__: function
    vars(utils)["is_compile_supported"] = lambda device: False
    sys.modules |= {module.__name__: module for module in (dynamo, utils)}
    try:
        import_module("timm")
    except (ImportError, AttributeError, TypeError):  # a version that needs more is imported as usual, by the caller
        for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
            del sys.modules[name]
    finally:
        for module in (dynamo, utils):
            del sys.modules[module.__name__]


if "torch._dynamo" not in sys.modules:
    _import_timm()
