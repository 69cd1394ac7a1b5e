"""Every executor against the plain one: same features under every mask, from every stage, in any order of swaps."""

import pytest
import torch
from torch import Tensor, nn

from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.executors.selection import Kind, make
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.model.backbone import Backbone
from tests.helpers.bundles import random_mask
from tests.helpers.networks import NETWORKS, calibrated, features, images

pytestmark = pytest.mark.slow

OTHERS: tuple[Kind, ...] = ("folded", "onnx")


# The last two: grouped convolutions with squeeze and excitation, layer scale.
@pytest.fixture(scope="module", params=[*NETWORKS, "test_byobnet", "test_convnext2"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return calibrated(request.param)


@pytest.fixture(scope="module")
def x(backbone: Backbone) -> Tensor:
    return images(backbone, 3)


@pytest.mark.parametrize("kind", OTHERS)
def test_equals_the_plain_executor(backbone: Backbone, x: Tensor, kind: Kind) -> None:
    plain = PlainExecutor(backbone, WeightCache(2**30))
    other = make(backbone, WeightCache(2**30), kind)
    generator = torch.Generator().manual_seed(2)
    want = features(plain, None, x, 0)
    assert want.std(dim=0).max() > 1e-3, "the images must differ, or this proves little"
    scale = float(want.abs().max())
    torch.testing.assert_close(features(other, None, x, 0), want, rtol=1e-4, atol=1e-5 * scale)
    for start in sorted({0, 1, len(backbone.stages) // 2, len(backbone.stages) - 1} - {len(backbone.stages)}):
        mask = random_mask(backbone, "m", start, generator, norms=True)
        got, masked = features(other, mask, x, start), features(plain, mask, x, start)
        scale = float(masked.abs().max())
        torch.testing.assert_close(got, masked, rtol=1e-3, atol=1e-4 * scale)
    torch.testing.assert_close(features(other, None, x, 0), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    plain.swap(None)  # it swaps the backbone's own model, which the next test takes


@pytest.mark.parametrize("kind", OTHERS)
def test_any_batch_size_and_image_size(kind: Kind) -> None:
    backbone = calibrated("test_efficientnet")
    plain, other = PlainExecutor(backbone, WeightCache(2**30)), make(backbone, WeightCache(2**30), kind)
    for shape in ((1, 64), (7, 64), (2, 96), (1, 64)):
        x = torch.randn(shape[0], 3, shape[1], shape[1], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(other.run(x), plain.run(x), rtol=1e-4, atol=1e-4)


def test_bfloat16() -> None:
    """Half the bytes, three digits; where the processor has no such arithmetic a clear no."""
    backbone = calibrated("test_resnet")
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        with pytest.raises(CascadeError, match="no bfloat16"):
            make(backbone, WeightCache(2**30), "bf16")
        return
    plain, half = PlainExecutor(backbone, WeightCache(2**30)), make(backbone, WeightCache(2**30), "bf16")
    x = images(backbone, 3)
    masks = [random_mask(backbone, "m", start, torch.Generator().manual_seed(start), norms=True) for start in (0, 3)]
    for mask in (None, *masks):
        start = mask.start if mask else 0
        want, got = features(plain, mask, x, start), features(half, mask, x, start)
        assert got.dtype == torch.float32
        assert nn.functional.cosine_similarity(got, want).min() > 0.999
        if mask:
            assert half.size(mask) <= plain.size(mask) // 2 + 64


@pytest.mark.parametrize("kind", OTHERS)
def test_the_backbones_weights_are_given_up(kind: Kind) -> None:
    """One copy of the weights stays, and everything still runs."""
    from cascade.engine.executors.selection import choose

    backbone = calibrated("test_resnet")
    x = images(backbone, 2)
    mask = random_mask(backbone, "m", 2, torch.Generator().manual_seed(0), norms=True)
    plain = PlainExecutor(backbone, WeightCache(2**30))
    want = features(plain, None, x, 0), features(plain, mask, x, 2)
    plain.swap(None)
    executor = choose(backbone, WeightCache(2**30), kind)
    assert backbone.weights.is_meta
    got = features(executor, None, x, 0), features(executor, mask, x, 2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_an_unpacked_mask_is_no_mask_for_others() -> None:
    executor = make(calibrated("test_resnet"), WeightCache(2**30), "folded")
    with pytest.raises(AssertionError, match="packed before it is swapped"):
        executor.swap(random_mask(executor.backbone, "m", 0, torch.Generator()))
