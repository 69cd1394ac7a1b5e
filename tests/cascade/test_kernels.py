"""Each kernel against its plain reference, on random masks."""

import pytest
import torch

from cascade import backbone as backbones
from cascade.backbone import Backbone
from cascade.masks import Mask, apply, apply_plain, pack


@pytest.fixture(scope="module", params=["tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return backbones.load(request.param, "random:0")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.925, 1.0])
@pytest.mark.parametrize("start", [0, 3, -1])
def test_fused_swap_equals_plain(backbone: Backbone, share: float, start: int) -> None:
    stage = backbone.stage(start)
    n = backbone.flat.numel() - backbone.offset(stage)
    mask = Mask("m", stage, pack(torch.rand(n, generator=torch.Generator().manual_seed(start)) < share))
    poisoned = torch.full((n,), float("nan"))
    found = apply(backbone, mask, poisoned)
    assert found is poisoned
    torch.testing.assert_close(found, apply_plain(backbone, mask, torch.empty(n)), rtol=1e-6, atol=0)


def test_segments_that_begin_inside_a_byte(backbone: Backbone) -> None:
    """Real layers are multiples of eight; a kernel must not count on it."""
    from cascade.kernels import cpu

    n = 1000
    weights = torch.randn(n, generator=torch.Generator().manual_seed(0))
    active = torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.6
    bounds = torch.tensor([0, 3, 21, 22, 500, 999, 1000])
    out = torch.full((n,), float("nan"))
    cpu.masked(pack(active).numpy(), weights.numpy(), bounds.numpy(), out.numpy())
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        share = max(int(active[begin:end].sum()), 1) / (end - begin)
        torch.testing.assert_close(out[begin:end], weights[begin:end] * active[begin:end] / share**0.5)
