"""Small networks whose features mean something, with masks and images for them: what tests of executors compare."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.densenet import DenseNet
from torch import Tensor, nn

from cascade.engine.executors import Executor
from cascade.kernels.weight_layout import BlockOrder
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.folding import Unit
from cascade.model.masks import Mask
from tests.helpers.bundles import random_mask

NETWORKS = [
    "test_resnet",
    "test_efficientnet",
    "test_vit",
    "test_convnext",
    "tiny_densenet",
]  # norms that can't be folded

default_cfgs = generate_default_cfgs({"tiny_densenet.untrained": {"input_size": (3, 64, 64)}})


@register_model
def tiny_densenet(pretrained: bool = False, **options: Any) -> nn.Module:
    """A DenseNet121 with one layer in each block: its norms come before the convolutions and can't be folded."""
    options |= {"growth_rate": 32, "block_config": (1, 1, 1, 1)}
    model: nn.Module = build_model_with_cfg(DenseNet, "tiny_densenet", pretrained, **options)
    return model


def calibrated(name: str) -> Backbone:
    """Random weights, with norms that do something and activations that stay in a sane range."""
    backbone = backbones.load(name, "random:0")
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(4, *images(backbone, 1).shape[1:], generator=generator)
    model = backbone.model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of this one batch
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.2, 0.2, generator=generator)
            module.reset_running_stats()
    with torch.no_grad():
        model(batch)
    return backbones.wrap(model.eval(), name, "random:0")


def masks_of(backbone: Backbone, *starts: int, norms: bool = True) -> list[Mask]:
    generator = torch.Generator().manual_seed(1)
    masks = [random_mask(backbone, f"m{i}", start, generator, norms) for i, start in enumerate(starts)]
    if norms and len(backbone.stages) == 1:  # a stage without a prefix
        moved = [
            {name: t * (1 + torch.rand(t.shape, generator=generator)) for name, t in backbone.norms.items()}
            for _ in masks
        ]
        masks = [replace(mask, norms=own) for mask, own in zip(masks, moved, strict=True)]
    return masks


def images(backbone: Backbone, count: int) -> Tensor:
    size = 160 if backbone.name == "test_vit" else 64
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def features(executor: Executor, mask: Mask | None, x: Tensor, start: int) -> Tensor:
    """Of stages from ``start`` on under a mask, which begins there; the plain backbone up to it."""
    executor.swap(None)
    x = executor.run(x, 0, start) if start else x
    executor.swap(None if mask is None else executor.pack(mask))
    return executor.run(x, start).clone()


def shuffled(unit: Unit, block: int) -> BlockOrder:
    """An order that no kernel may take for granted: columns at random, with padding."""
    columns = np.random.default_rng(unit.offset).permutation(unit.columns)
    padding = -unit.columns % 4
    return BlockOrder(block, np.append(columns, [-1] * padding).astype(np.int32))
