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


def test_one_adapter_of_each_kind_in_a_batch(backbone: Backbone) -> None:
    """On a GPU: masks and trained channels inside the products; deltas, and what is no layer's, by swaps."""
    cache = WeightCache(2**30)
    executor = CudaExecutor(backbone, cache)
    start = len(backbone.stages) // 2
    kinds = {name: mask for name, mask in adapters(backbone, start).items() if mask.start == start}
    x = torch.randn(2 * len(kinds), *backbone.config["input_size"], generator=torch.Generator().manual_seed(1))
    packed = [executor.pack(mask) for mask in kinds.values()]
    swapped = [mask for mask in packed if mask.loose or mask.steps.numel()]
    if backbone.name == "test_vit":  # only one changes no layer norm, so it has no company
        swapped = packed
    assert len(swapped) in (2, len(packed))
    got = executor.run_each(executor.run(x, 0, start), packed * 2, start)
    assert cache.misses == len(swapped)
    for row, mask in enumerate([*kinds.values()] * 2):
        want = reference(backbone, mask, x[row : row + 1])[0]
        assert float((got[row] - want).norm() / want.norm()) < 1e-4, [*kinds][row % len(kinds)]
