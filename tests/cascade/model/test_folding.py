"""Folding: which layers take their BatchNorm in, and what stays loose."""

import pytest
import timm
import torch
from torch import nn

from cascade.model import backbone as backbones
from cascade.model.folding import Folded
from tests.helpers.bundles import random_mask


@pytest.mark.parametrize(
    "name, folded, loose",
    [("resnet18", 20, 0), ("tf_efficientnet_lite0", 49, 0), ("vit_tiny_patch16_224", 0, 0), ("densenet121", 59, 124)],
)
def test_what_is_folded(name: str, folded: int, loose: int) -> None:
    """A DenseNet has norms that no convolution precedes: their statistics stay what they are."""
    found = Folded(backbones.load(name, "random:0"))
    assert sum(unit.norm is not None for unit in found.units) == folded
    assert len(found.always) == loose
    norms = [n for n, m in found.model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == loose // 2, "the others are gone from the model"


def test_rows_and_alphas_of_a_fused_qkv() -> None:
    """Query, key and value have an alpha each (method.md §1), so their rows have scales of three values."""
    backbone = backbones.load("vit_tiny_patch16_224", "random:0")
    mask = random_mask(backbone, "m", 0, torch.Generator().manual_seed(0))
    folded = Folded(backbone)
    affines = dict(zip([u.module for u in folded.units], folded.affines(mask), strict=True))
    scale = affines["blocks.0.attn.qkv"].scale
    assert len(scale) == 3 * 192 and len(set(scale)) == 3 == len(set(scale[::192]))
    assert len(set(affines["blocks.0.mlp.fc1"].scale)) == 1


def test_an_affine_of_zero_divides_nothing() -> None:
    """timm begins the last BatchNorm of a residual block at zero; a mask's scale must stay finite."""
    model = timm.create_model("test_resnet", num_classes=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    backbone = backbones.wrap(model, "test_resnet", "random:0")
    folded = Folded(backbone)
    for affine in folded.affines(random_mask(backbone, "m", 0, torch.Generator().manual_seed(0), norms=True)):
        assert torch.from_numpy(affine.scale).isfinite().all() and torch.from_numpy(affine.shift).isfinite().all()


def test_the_backbone_keeps_its_own_model() -> None:
    backbone = backbones.load("test_efficientnet", "random:0")
    x = torch.randn(1, *backbone.config["input_size"], generator=torch.Generator().manual_seed(0))
    before = backbone.model(x)
    Folded(backbone)
    assert backbone.model(x).equal(before)
