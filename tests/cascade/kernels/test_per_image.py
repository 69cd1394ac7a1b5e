"""Layers with one mask per image, against their plain references: on a GPU, or in Triton's interpreter."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cascade.kernels.per_image import (
    Layer,
    Masks,
    _launch,
    masked_conv,
    masked_conv_plain,
    masked_linear,
    masked_linear_plain,
)
from cascade.kernels.weight_layout import PackedMask
from cascade.model.masks import pack

pytestmark = pytest.mark.slow

PLACE, ROW = 48, 5  # something lies before the layer


def drawn(layer: Layer, begins: Sequence[tuple[int, int]], dtype: torch.dtype, device: str) -> tuple[Tensor, Masks]:
    """A flat buffer that ends with the layer, and a mask from each place and row in it to the end."""
    generator = torch.Generator().manual_seed(len(begins))
    n, rows = layer.place + layer.shape[0] * layer.columns, layer.row + layer.shape[0]
    masks = [
        PackedMask(
            "m",
            0,
            pack(torch.rand(-(-n // 16) * 16 - begin, generator=generator) < 0.6).to(device),
            scales=(torch.rand(rows - row, generator=generator) + 0.5).to(device),
            shifts=torch.randn(rows - row, generator=generator).to(dtype).to(device),
        )
        for begin, row in begins
    ]
    weights = torch.randn(n, generator=generator).to(dtype).to(device)
    return weights, Masks(masks, [b for b, _ in begins], [r for _, r in begins])


def inputs(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)


def close(got: Tensor, want: Tensor) -> None:
    """Sums of hundreds of products, in another order; where bfloat16 is rounded differs, too."""
    assert want.std() > 0.1 and got.shape == want.shape and got.dtype == want.dtype
    loose = 1e-4 if want.dtype == torch.float32 else 0.03
    torch.testing.assert_close(got, want, rtol=loose, atol=loose * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "tokens, wide, rows",
    [((50,), 48, 96), ((7,), 80, 65), ((130,), 33, 17), ((), 100, 3), ((3, 5), 16, 130)],
    ids=str,
)
def test_linear_equals_plain(tokens: tuple[int, ...], wide: int, rows: int, dtype: torch.dtype, device: str) -> None:
    """Shapes that are no multiples of the tiles, rows of bits that begin anywhere."""
    layer = Layer(PLACE, ROW, (rows, wide, 1, 1))
    weights, masks = drawn(layer, [(0, 0), (16, 2), (PLACE, ROW)], dtype, device)
    x = inputs(3, *tokens, wide, dtype=dtype, device=device)
    got = masked_linear(x, weights, layer, masks.table)
    close(got, masked_linear_plain(x, weights, layer, masks))
    assert got.shape == (3, *tokens, rows)


CONVOLUTIONS = {
    "pointwise": Layer(PLACE, ROW, (40, 32, 1, 1)),
    "pointwise, odd": Layer(PLACE, ROW, (19, 24, 1, 1)),
    "pointwise, stride 2": Layer(PLACE, ROW, (32, 16, 1, 1), stride=(2, 2)),
    "3 x 3": Layer(PLACE, ROW, (24, 32, 3, 3), padding=(1, 1, 1, 1)),
    "3 x 3, few channels": Layer(PLACE, ROW, (70, 5, 3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
    "stem": Layer(PLACE, ROW, (16, 3, 7, 7), stride=(2, 2), padding=(3, 3, 3, 3)),
    "same as TensorFlow": Layer(PLACE, ROW, (8, 3, 3, 3), stride=(2, 2), padding=None),
    "oblong, dilated": Layer(PLACE, ROW, (8, 4, 3, 5), (1, 2), (2, 0, 1, 3), (2, 1)),
    "patches": Layer(PLACE, ROW, (48, 3, 4, 4), stride=(4, 4)),
    "groups": Layer(PLACE, ROW, (36, 8, 3, 3), padding=(1, 1, 1, 1), groups=3),
    "depthwise": Layer(PLACE, ROW, (70, 1, 3, 3), padding=(1, 1, 1, 1), groups=70),
    "depthwise, stride 2": Layer(PLACE, ROW, (24, 1, 5, 5), stride=(2, 2), padding=None, groups=24),
    "two rows a channel": Layer(PLACE, ROW, (12, 1, 3, 3), padding=(1, 1, 1, 1), groups=6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_equals_plain(name: str, dtype: torch.dtype, device: str) -> None:
    layer = CONVOLUTIONS[name]
    weights, masks = drawn(layer, [(0, 0), (PLACE, ROW), (32, 3)], dtype, device)
    x = inputs(3, layer.shape[1] * layer.groups, 13, 12, dtype=dtype, device=device)
    got = masked_conv(x, weights, layer, masks.table)
    assert got.is_contiguous(memory_format=torch.channels_last)
    close(got, masked_conv_plain(x, weights, layer, masks))


def test_one_mask_for_all(device: str) -> None:
    layer = Layer(PLACE, ROW, (40, 32, 1, 1))
    weights, masks = drawn(layer, [(0, 0)], torch.float32, device)
    together = Masks(masks.masks * 5, [0] * 5, [0] * 5)
    x = inputs(5, 9, 32, dtype=torch.float32, device=device)
    got = masked_linear(x, weights, layer, together.table)
    want = torch.cat([masked_linear_plain(x[i : i + 1], weights, layer, masks) for i in range(5)])
    close(got, want)


def test_images_do_not_see_each_others_masks(device: str) -> None:
    layer = Layer(PLACE, ROW, (40, 32, 1, 1))
    weights, masks = drawn(layer, [(0, 0), (0, 0), (0, 0)], torch.float32, device)
    x = inputs(1, 9, 32, dtype=torch.float32, device=device).expand(3, 9, 32)
    a, b, c = masked_linear(x, weights, layer, masks.table)
    assert not a.allclose(b, atol=0.1) and not b.allclose(c, atol=0.1)
    turned = masked_linear(x, weights, layer, masks.table.flip(0))
    assert turned.equal(torch.stack([c, b, a]))


def test_images_that_are_cut_into_windows(device: str) -> None:
    """Some networks make a batch of the parts of an image; they stay together, image by image."""
    layer = Layer(PLACE, ROW, (20, 16, 1, 1))
    weights, masks = drawn(layer, [(0, 0), (16, 1)], torch.float32, device)
    x = inputs(8, 6, 16, dtype=torch.float32, device=device)
    close(masked_linear(x, weights, layer, masks.table), masked_linear_plain(x, weights, layer, masks))


def test_the_plain_reference_is_what_pytorch_computes() -> None:
    """With every weight kept, scales of one and no shift nothing is left of the mask."""
    conv = torch.nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2, groups=2, bias=False)
    flat = conv.weight.detach().permute(0, 2, 3, 1).reshape(-1)
    mask = PackedMask("m", 0, pack(torch.ones(len(flat)) > 0), scales=torch.ones(8), shifts=torch.zeros(8))
    layer = Layer(0, 0, (8, 3, 3, 3), (2, 2), (1, 1, 1, 1), (2, 2), 2)
    x = inputs(2, 6, 11, 10, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(masked_conv_plain(x, flat, layer, Masks([mask] * 2, [0] * 2, [0] * 2)), conv(x))


def test_images_beyond_32_bits_are_refused() -> None:
    """Offsets inside of an image are 32 bits: a larger one would be read at the wrong place, without any error."""
    layer = Layer(0, 0, (2, 1, 1, 1))
    table, weights = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(2)
    wide = torch.zeros(1).expand(1, 1, 1 << 16, 1 << 15)  # takes no memory
    with pytest.raises(AssertionError, match="32 bits"):
        _launch(wide, torch.zeros(1), wide.shape[2:], weights, layer, table)
    with pytest.raises(AssertionError, match="32 bits"):
        _launch(torch.zeros(1), wide, wide.shape[2:], weights, layer, table)
    with pytest.raises(AssertionError, match="32 bits"):
        _launch(torch.zeros(1), torch.zeros(1), (1, 1), torch.zeros(1).expand(1 << 31), layer, table)
