"""What engines are compared with: models that are built separately for each mask."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.bundle.format import Bundle
from cascade.kernels.materialize import materialize
from cascade.model import backbone as backbones
from cascade.model.fusion import Mode
from cascade.model.masks import Mask

SHAPES: dict[str, dict[str, Any]] = {
    "everything masked": {"norms": True},
    "experts deeper": {"mask_from": 0, "expert_from": 3, "norms": True},
    "both deep": {"mask_from": 2, "expert_from": 4, "norms": True, "slots": "padded"},
    "last stage": {"mask_from": 4, "experts": 3, "router": "gmm"},
    "another family": {"backbone": "test_efficientnet", "mask_from": 3, "router": "prototypes", "norms": True},
    "transformer": {"backbone": "test_vit", "mask_from": 1, "expert_from": 5, "size": 160, "slots": "padded"},
    "one stage": {"backbone": "test_convnext", "experts": 3},
    "single mask": {"experts": 0, "norms": True},
}
"""Bundles of every shape, as options of ``handmade``."""


def masked_model(bundle: Bundle, masks: list[Mask]) -> torch.nn.Module:
    """A whole model of its own with the masks' weights written into it, one after the other."""
    backbone = backbones.load(bundle.card.backbone.name, bundle.card.backbone.source)
    for mask in masks:
        first = backbone.offset(mask.start)
        flat = materialize(backbone, mask)
        backbone.point(flat, first)
        state = backbone.model.state_dict()
        for name, tensor in mask.norms.items():
            state[name].copy_(tensor)
    return backbone.model


class Reference:
    """What a bundle answers, by separately built models; each runs once, one image at a time.

    Attributes:
        clusters: of each image.
    """

    @torch.inference_mode()
    def __init__(self, bundle: Bundle, images: Sequence[Image.Image]) -> None:
        transform = bundle.preprocessing.transform()
        inputs = [transform(image)[None] for image in images]

        def features(*masks: Mask) -> Tensor:
            model = masked_model(bundle, list(masks))
            return torch.cat([model(x) for x in inputs])

        self._bundle = bundle
        self._dispatcher = features(bundle.dispatcher)
        self._experts = [features(bundle.dispatcher, expert) for expert in bundle.experts]
        self.clusters = [0] * len(images)
        if bundle.router is not None:
            self.clusters = [int(bundle.router.probabilities(x).argmax()) for x in self._dispatcher.split(1)]

    @torch.inference_mode()
    def embeddings(self, mode: Mode) -> np.ndarray:
        """[N, D]."""
        fusion = self._bundle.fusions[mode]
        out = fusion.bias + self._dispatcher @ fusion.weight[0].float()
        clusters = torch.tensor(self.clusters)
        for k, expert in enumerate([] if mode == "dispatcher" else self._experts):
            slot = 1 if len(fusion.weight) == 2 else k + 1
            takes = clusters == k if mode == "conditional" else clusters >= 0
            out = out + takes[:, None] * (expert @ fusion.weight[slot].float())
        return out.numpy()
