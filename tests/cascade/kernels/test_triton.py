"""The swap on a GPU against its plain reference; without a GPU in Triton's interpreter."""

from typing import Any

import pytest
import torch

from cascade.kernels import triton
from cascade.kernels.weight_layout import WeightLayout
from cascade.model import backbone as backbones
from cascade.model.folding import Folded
from tests.helpers.adapters import adapters
from tests.helpers.bundles import random_mask
from tests.helpers.networks import shuffled

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("block", [1, 8, 16])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_swap_equals_plain(name: str, block: int, dtype: torch.dtype, device: str) -> None:
    """Rows of all lengths, in order and in blocks, from the beginning and from later stages."""
    backbone = backbones.load(name, "random:0", device=device)
    folded = Folded(backbone)
    flat = WeightLayout(folded, [shuffled(unit, block) for unit in folded.units])
    for start in (0, 2, len(backbone.stages) - 1):
        mask = flat.pack(
            random_mask(backbones.load(name, "random:0"), "m", start, torch.Generator().manual_seed(start), True)
        ).to(device)
        pristine = flat.pristine[flat.begin[flat.first(start)] :]
        out = torch.full_like(pristine, torch.nan, dtype=dtype)
        triton.masked(mask.bits, pristine, flat.tiles(start), mask.scales, out)
        rtol = 1e-6 if dtype == torch.float32 else 0.01  # rounded from numbers that may differ in their last bit
        torch.testing.assert_close(out, flat.materialize_plain(mask).to(dtype), rtol=rtol, atol=0)
        assert flat.tiles(start) is flat.tiles(start), "made once"


@pytest.mark.parametrize(("block", "dtype"), [(1, torch.bfloat16), (16, torch.float32)], ids=["rows", "blocks"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_swap_of_a_delta_equals_plain(name: str, block: int, dtype: torch.dtype, device: str) -> None:
    """Padding has bits of zero, which would mean minus; nothing is read behind the last row."""
    backbone = backbones.load(name, "random:0", device=device)
    folded = Folded(backbone)
    flat = WeightLayout(folded, [shuffled(unit, block) for unit in folded.units])
    for start in (0, 2, len(backbone.stages) - 1):
        mask = flat.pack(adapters(backbones.load(name, "random:0"), start)["delta"]).to(device)
        pristine = flat.pristine[flat.begin[flat.first(start)] :]
        out = torch.full_like(pristine, torch.nan, dtype=dtype)
        triton.signed(mask.bits, pristine, flat.tiles(start), mask.scales, mask.steps, out)
        out.index_fill_(0, flat._padding(start), 0)
        rtol = 1e-5 if dtype == torch.float32 else 0.01
        torch.testing.assert_close(out, flat.materialize_plain(mask).to(dtype), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 2, 3, 9, 16, 41, 147, 2047, 2048, 4608, triton.LONGEST])
def test_rows_of_any_length(columns: int, device: str) -> None:
    """A row begins and ends anywhere in a tile; each weight must find its own row's scale."""
    rows = max(2, min(5000 // columns, 40))
    n = -(-rows * columns // triton.WORD) * triton.WORD
    weights, out = torch.zeros(n), torch.full((n,), torch.nan)
    weights[: rows * columns] = 1
    bits = torch.full((n // 8,), 255, dtype=torch.uint8)
    bits[rows * columns // 8 :] = 0
    if rest := rows * columns % 8:
        bits[rows * columns // 8] = (1 << rest) - 1
    scales = torch.arange(1.0, rows + 1)
    everything: Any = [t.to(device) for t in (bits, weights, triton.tiles([0, n], [0], [columns], [1]), scales, out)]
    triton.masked(*everything)
    want = torch.cat([scales.repeat_interleave(columns), torch.zeros(n - rows * columns)])
    assert everything[-1].cpu().equal(want)


def test_nothing_to_do(device: str) -> None:
    """A mask may begin behind the last layer that has weights."""
    empty = torch.empty(0, device=device)
    triton.masked(empty.to(torch.uint8), empty, triton.tiles([0], [], [], []).to(device), empty, empty)


def test_orders_that_no_tile_can_hold() -> None:
    with pytest.raises(AssertionError, match="32 bits"):
        triton.tiles([0, 16], [0], [triton.LONGEST + 1], [1])
