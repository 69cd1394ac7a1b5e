"""What the interpreter can't show of the kernels; tests/cascade/kernels compares them with their references."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cascade.kernels import per_image
from cascade.kernels.weight_layout import PackedMask, WeightLayout
from cascade.model import backbone as backbones
from cascade.model.folding import Folded
from tests.helpers.bundles import random_mask
from tests.helpers.networks import shuffled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_swap_is_one_launch(dtype: torch.dtype, device: str) -> None:
    folded = Folded(backbones.load("resnet18", "random:0", device=device))
    flat = WeightLayout(folded, [shuffled(unit, 1) for unit in folded.units])
    mask = random_mask(backbones.load("resnet18", "random:0"), "m", 0, torch.Generator().manual_seed(0))
    packed, out = flat.pack(mask).to(device), torch.empty_like(flat.pristine, dtype=dtype)
    flat.materialize(packed, out)  # compiles, and uploads the table
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        flat.materialize(packed, out)
        torch.cuda.synchronize()
    launches = [event.name for event in seen.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launches) == 1 and "_masked" in launches[0], launches


def test_products_follow_pytorchs_switch(device: str) -> None:
    """By default as exact as float32; who sets the switch gets TF32."""
    layer = per_image.Layer(0, 0, (64, 1024, 1, 1))
    draw = torch.Generator().manual_seed(0)
    weights, x = torch.randn(64 * 1024, generator=draw), torch.randn(1, 64, 1024, generator=draw)
    bits = torch.full((64 * 128,), 255, dtype=torch.uint8, device=device)
    mask = PackedMask("m", 0, bits, scales=torch.ones(64, device=device), shifts=torch.zeros(64, device=device))
    table = per_image.Masks([mask], [0], [0]).table
    want = x.double() @ weights.view(64, 1024).double().T

    def error() -> float:
        got = per_image.masked_linear(x.to(device), weights.to(device), layer, table)
        return float((got.cpu() - want).abs().max() / want.abs().max())

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert error() < 1e-5
        torch.set_float32_matmul_precision("high")
        assert 1e-5 < error() < 1e-2
    finally:
        torch.set_float32_matmul_precision(before)
