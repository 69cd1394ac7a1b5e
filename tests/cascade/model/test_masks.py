"""Masks: how many, which parameters, which bit is whose, and what they make of the weights."""

from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch

from cascade.kernels.materialize import materialize
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone, maskable
from cascade.model.masks import Mask, alpha, density, difference, pack, split, unpack
from tests.helpers.bundles import random_mask


def resnet18() -> int:
    convolutions, affines, width = 3 * 64 * 7**2, 0, 64
    for stage in range(4):
        planes = 64 * 2**stage
        convolutions += width * planes * 3**2 + 3 * planes * planes * 3**2
        if width != planes:
            convolutions, affines = convolutions + width * planes, affines + 2 * planes
        width = planes
    return convolutions + affines


def resnet50() -> int:
    convolutions, affines, width = 3 * 64 * 7**2, 0, 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        planes = 64 * 2**stage
        convolutions, affines = convolutions + width * 4 * planes, affines + 2 * 4 * planes  # the shortcut's
        for _ in range(blocks):
            convolutions += width * planes + planes * planes * 3**2 + planes * 4 * planes
            width = 4 * planes
    assert (convolutions, affines) == (23_454_912, 7_680)
    return convolutions + affines


def clip_vit_b_32() -> int:
    d, hidden = 768, 3072
    attention = 3 * (d * d + d) + (d * d + d)  # q, k, v and out, with biases
    return 12 * (attention + (d * hidden + hidden) + (hidden * d + d))


def inverted_residuals(
    stem: int, table: tuple[tuple[int, int, int, int], ...], kernels: tuple[int, ...], head: int
) -> int:
    """MobileNetV2 and its children: rows of (expansion, output channels, blocks, input channels)."""
    total = 3 * stem * 3**2
    for (expansion, out, blocks, width), kernel in zip(table, kernels, strict=True):
        for _ in range(blocks):
            hidden = expansion * width
            total += hidden * kernel**2 + hidden * out + (width * hidden if expansion > 1 else 0)
            width = out
    return total + table[-1][1] * head


def mobilenet_v2() -> int:
    table = (
        (1, 16, 1, 32),
        (6, 24, 2, 16),
        (6, 32, 3, 24),
        (6, 64, 4, 32),
        (6, 96, 3, 64),
        (6, 160, 3, 96),
        (6, 320, 1, 160),
    )
    return inverted_residuals(32, table, (3,) * 7, 1280)


def efficientnet_lite0() -> int:
    table = (
        (1, 16, 1, 32),
        (6, 24, 2, 16),
        (6, 40, 2, 24),
        (6, 80, 3, 40),
        (6, 112, 3, 80),
        (6, 192, 4, 112),
        (6, 320, 1, 192),
    )
    return inverted_residuals(32, table, (3, 3, 5, 3, 5, 5, 3), 1280)


def convnext_tiny() -> int:
    widths, depths = (96, 192, 384, 768), (3, 3, 9, 3)
    blocks = sum(n * (d * 7**2 + d * 4 * d + 4 * d * d) for n, d in zip(depths, widths, strict=True))
    return blocks + sum(a * b * 2**2 for a, b in zip(widths, widths[1:], strict=False))


@pytest.mark.parametrize(
    ("name", "golden", "derived"),
    [
        ("resnet18", 11_168_704, resnet18),
        ("resnet50", 23_462_592, resnet50),
        ("vit_base_patch32_clip_224", 85_017_600, clip_vit_b_32),
        ("tf_efficientnet_lite0", 3_328_992, efficientnet_lite0),
        ("mobilenetv2_100", 2_189_760, mobilenet_v2),
        ("convnext_tiny", 27_751_392, convnext_tiny),
    ],
)
def test_golden_counts(name: str, golden: int, derived: Callable[[], int]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    found = list(maskable(model))
    assert sum(sizes[n] for n in found) == golden == derived()
    assert found == [n for n in sizes if n in found], "in the model's own order, as docs/bundle-format.md says"


def rows_of(name: str) -> dict[str, int]:
    with torch.device("meta"):
        return maskable(timm.create_model(name, num_classes=0))


def test_resnet_masks_convolutions_and_all_of_the_shortcuts() -> None:
    rows = rows_of("resnet18")
    assert {"conv1.weight", "layer1.0.conv2.weight", "layer2.0.downsample.0.weight"} <= rows.keys()
    assert {"layer2.0.downsample.1.weight", "layer2.0.downsample.1.bias"} <= rows.keys()
    assert not {"bn1.weight", "bn1.bias", "layer2.0.bn1.weight"} & rows.keys()
    assert set(rows.values()) == {1}


def test_vit_masks_projections_with_qkv_in_three() -> None:
    rows = rows_of("vit_base_patch32_clip_224")
    layers = {n.partition(".")[2].partition(".")[2]: count for n, count in rows.items()}  # without "blocks.N."
    kinds = {f"{layer}.{kind}" for layer in ("attn.proj", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")}
    assert layers == {"attn.qkv.weight": 3, "attn.qkv.bias": 3} | dict.fromkeys(kinds, 1)
    assert len(rows) == 12 * 8, "no patch embedding, norms, class token or position"


def test_others_mask_weights_and_leave_the_patch_embedding() -> None:
    rows = rows_of("convnext_tiny")
    assert all(n.endswith(".weight") for n in rows)
    assert "stem.0.weight" not in rows
    assert {"stages.1.downsample.1.weight", "stages.0.blocks.0.conv_dw.weight"} <= rows.keys()
    assert "stages.0.blocks.0.mlp.fc1.weight" in rows
    assert not {n for n in rows if "norm" in n}
    assert "patch_embed.proj.weight" not in rows_of("swin_tiny_patch4_window7_224")
    assert "conv_stem.weight" in rows_of("mobilenetv2_100"), "a first convolution that overlaps itself is none"


def test_golden_bytes() -> None:
    active = torch.tensor([True, False, False, True, False, False, False, False, True, True])
    assert pack(active).tolist() == [0b00001001, 0b00000011]
    assert unpack(torch.tensor([0b00001001, 0b00000011], dtype=torch.uint8), 10).equal(active)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 1000, 4097])
def test_packs_as_numpy_does_and_back(n: int, generator: np.random.Generator) -> None:
    active = generator.random(n) < 0.7
    packed = pack(torch.from_numpy(active))
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), np.packbits(active, bitorder="little"))
    np.testing.assert_array_equal(unpack(packed, n).numpy(), active)


def test_alpha_is_the_root_of_the_share_and_never_zero() -> None:
    assert alpha(torch.tensor([True, False, False, False])) == 0.5
    assert alpha(torch.ones(7, dtype=torch.bool)) == 1.0
    assert alpha(torch.zeros(100, dtype=torch.bool)) == 0.1  # as if one were active


@pytest.fixture(scope="module", params=["test_resnet", "test_vit", "test_efficientnet"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return backbones.load(request.param, "random:0")


def by_hand(backbone: Backbone, mask: Mask) -> dict[str, np.ndarray]:
    """W * M / alpha in float64, one array a parameter, with the order and the blocks written out once more."""
    parameters = dict(backbone.model.named_parameters())
    stages = [stage.prefixes for stage in backbone.stages]

    def stage(name: str) -> int:
        return next((i for i, p in enumerate(stages) if name.startswith(tuple(f"{x}." for x in p))), len(stages) - 1)

    names = sorted(maskable(backbone.model), key=stage)
    bits = np.unpackbits(mask.bits.numpy(), bitorder="little").astype(bool)
    out, at = {}, 0
    for name in (n for n in names if stage(n) >= mask.start):
        weight = parameters[name].detach().double().numpy()
        active = bits[at : at + weight.size].reshape(weight.shape)
        at += weight.size
        blocks = 3 if ".qkv." in name else 1
        pairs = zip(np.split(weight, blocks), np.split(active, blocks), strict=True)
        out[name] = np.concatenate([w * m / np.sqrt(max(m.mean(), 1 / m.size)) for w, m in pairs])
    assert len(bits) - at < 8
    return out


@pytest.mark.parametrize("start", [0, 2])
def test_apply_is_weight_times_mask_over_alpha(backbone: Backbone, start: int) -> None:
    mask = random_mask(backbone, "dispatcher", start, torch.Generator().manual_seed(1))
    n = backbone.weights.numel() - backbone.offset(start)
    active = unpack(mask.bits, n)
    active[: backbone.segments[0].size] = False  # a tensor that is all off is all zero, not NaN
    mask = Mask(mask.name, start, pack(active))
    pristine = backbone.weights.clone()
    want = by_hand(backbone, mask)
    flat = materialize(backbone, mask)
    assert flat.shape == (n,)
    np.testing.assert_allclose(flat.numpy(), np.concatenate([w.ravel() for w in want.values()]), rtol=1e-6)
    buffer = torch.full((n,), torch.nan)
    assert materialize(backbone, mask, buffer) is buffer
    assert buffer.equal(flat)
    assert backbone.weights.equal(pristine), "the pristine weights are never written"
    backbone.point(flat, backbone.offset(start))
    try:
        parameters = dict(backbone.model.named_parameters())
        for name, weight in want.items():
            np.testing.assert_allclose(parameters[name].numpy(), weight, rtol=1e-6)
            assert parameters[name].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    finally:
        backbone.point(backbone.weights)


def test_split_density_and_difference(backbone: Backbone) -> None:
    whole = random_mask(backbone, "dispatcher", 0, torch.Generator().manual_seed(1))
    active = unpack(whole.bits, backbone.weights.numel())
    assert density(backbone, whole) == pytest.approx(float(active.double().mean()), abs=1e-6)
    parts = list(split(backbone, 0, active))
    assert [segment for segment, _ in parts] == backbone.segments
    assert torch.cat([part for _, part in parts]).equal(active)
    first = backbone.offset(2)
    tail = active[first:].clone()
    tail[::10] ^= True
    late = Mask("expert-0", 2, pack(tail))
    share = len(tail[::10]) / len(tail)
    assert difference(whole, late, backbone) == pytest.approx(share, abs=1e-6)
    assert difference(late, whole, backbone) == pytest.approx(share, abs=1e-6)
    assert difference(whole, whole, backbone) == 0
    assert [segment for segment, _ in split(backbone, 2, tail)] == [s for s in backbone.segments if s.stage >= 2]


def test_a_mask_counts_its_statistics() -> None:
    mask = Mask("dispatcher", 0, torch.zeros(10, dtype=torch.uint8), {"bn1.running_mean": torch.zeros(4)})
    assert mask.bytes() == 10 + 4 * 4
