"""The folded backbone in an executor's order: against plain PyTorch, for orders that executors have and others."""

from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from cascade.kernels.materialize import materialize
from cascade.kernels.weight_layout import BlockOrder, WeightLayout
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.folding import Folded
from tests.helpers.adapters import adapters
from tests.helpers.bundles import random_mask
from tests.helpers.networks import shuffled


@pytest.fixture(scope="module", params=["test_resnet", "test_efficientnet", "test_vit"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return backbones.load(request.param, "random:0")


@pytest.mark.parametrize("block", [1, 8, 16])
@pytest.mark.parametrize("start", [0, 2, -1])
def test_kernels_equal_their_references(backbone: Backbone, block: int, start: int) -> None:
    folded = Folded(backbone)
    flat = WeightLayout(folded, [shuffled(unit, block) for unit in folded.units])
    mask = random_mask(backbone, "m", backbone.stage(start), torch.Generator().manual_seed(0), norms=True)
    packed = flat.pack(mask)
    assert packed.bits.equal(flat.reorder_plain(mask))
    out = torch.zeros(flat.size(mask.start) // 4)
    assert flat.materialize(packed, out) is out
    torch.testing.assert_close(out, flat.materialize_plain(packed), rtol=1e-6, atol=0)


def test_weights_are_those_of_the_masked_model(backbone: Backbone) -> None:
    """Row by row in the model's own order: W * M / alpha times what the BatchNorm multiplies with."""
    folded = Folded(backbone)
    flat = WeightLayout(folded, [BlockOrder(1, np.arange(unit.columns, dtype=np.int32)) for unit in folded.units])
    mask = random_mask(backbone, "m", 0, torch.Generator().manual_seed(1), norms=True)
    whole, found, affines = materialize(backbone, mask), flat.materialize(flat.pack(mask)), folded.affines(mask)
    for i, unit in enumerate(folded.units):
        want = whole[unit.offset : unit.offset + unit.rows * unit.columns].view(unit.rows, -1).double()
        if unit.norm:
            norm = cast(nn.BatchNorm2d, backbone.model.get_submodule(unit.norm))
            gamma = (
                whole[slice(*backbone.spans[f"{unit.norm}.weight"])]
                if f"{unit.norm}.weight" in backbone.spans
                else norm.weight
            )
            want = (
                want * (gamma.double() / (mask.norms[f"{unit.norm}.running_var"].double() + norm.eps).sqrt())[:, None]
            )
        begin = int(flat.begin[i])
        got = found[begin : begin + unit.rows * unit.columns].view(unit.rows, -1).double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)
        assert affines[i].scale.shape == affines[i].shift.shape == (unit.rows,)


def test_packed_bytes(backbone: Backbone) -> None:
    """A bit a weight, eight bytes a row; padding may add a little."""
    folded = Folded(backbone)
    flat = WeightLayout(folded, [shuffled(unit, 1) for unit in folded.units])
    packed = flat.pack(random_mask(backbone, "m", 0, torch.Generator().manual_seed(0), norms=True))
    weights, rows = (sum(n) for n in zip(*((u.rows * u.columns, u.rows) for u in folded.units), strict=True))
    assert weights / 8 + 8 * rows <= packed.bytes() < 1.1 * (weights / 8 + 8 * rows)
    assert not packed.norms, "the statistics are in scales and shifts"


def test_a_mask_without_weights() -> None:
    """A stage that holds nothing maskable: nothing to write, and no error."""
    backbone = backbones.load("test_vit", "random:0")
    folded = Folded(backbone)
    flat = WeightLayout(folded, [shuffled(unit, 8) for unit in folded.units])
    last = len(backbone.stages) - 1
    packed = flat.pack(random_mask(backbone, "m", last, torch.Generator().manual_seed(0)))
    assert flat.size(last) == 0 and flat.materialize(packed).numel() == 0


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("start", [0, 2])
def test_the_kernel_for_deltas_equals_its_reference(backbone: Backbone, block: int, start: int) -> None:
    """Padding has bits of zero, which would mean minus: it must be zero all the same."""
    folded = Folded(backbone)
    flat = WeightLayout(folded, [shuffled(unit, block) for unit in folded.units])
    packed = flat.pack(adapters(backbone, start)["delta"])
    out = torch.full((flat.size(start) // 4,), torch.nan)
    out[flat._padding(start)] = 1
    whole = flat.materialize(packed, out)
    want = flat.materialize_plain(packed)
    used = ~whole.isnan()  # the gaps between units are left as they are
    assert used.float().mean() > 0.9
    torch.testing.assert_close(whole[used], want[used], rtol=1e-5, atol=1e-6)
    assert (whole[flat._padding(start)] == 0).all()
