"""Every kind of adapter gives the same features in all executors as its values written into a plain model."""

import pytest
import torch

from cascade.engine.executors.cuda import CudaExecutor
from cascade.engine.executors.selection import Kind, make
from cascade.engine.weight_cache import WeightCache
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from tests.helpers.adapters import NETWORKS, adapters, reference

pytestmark = pytest.mark.slow


@pytest.fixture(params=NETWORKS)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """Random weights. timm's ResNets begin with BatchNorm scales of zero, so that adapters switch channels on here."""
    return backbones.load(request.param, "random:0")


@pytest.mark.parametrize("kind", ["plain", "folded", "onnx", "cuda"])
def test_all_executors_agree_with_the_reference(backbone: Backbone, kind: Kind) -> None:
    cache = WeightCache(2**30)
    executor = CudaExecutor(backbone, cache) if kind == "cuda" else make(backbone, cache, kind)
    x = torch.randn(2, *backbone.config["input_size"], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        pristine = backbone.model(x)
    for start in (0, len(backbone.stages) // 2, len(backbone.stages) - 1):
        for name, mask in adapters(backbone, start).items():
            executor.swap(None)  # the plain executor writes into the backbone's own model
            want = reference(backbone, mask, x)
            trunk = executor.run(x, 0, mask.start) if mask.start else x
            executor.swap(executor.pack(mask))
            got = executor.run(trunk, mask.start).clone()
            error = float((got - want).norm() / want.norm())
            assert error < 1e-4, f"{name} from stage {start}: relative error {error:.2g}"
            if name == "channels" and start == 0:
                assert (got - pristine).norm() > 1e-2 * pristine.norm(), f"{name} does something"
    executor.swap(None)
    torch.testing.assert_close(executor.run(x), pristine, rtol=1e-3, atol=1e-4 * float(pristine.abs().max()))
