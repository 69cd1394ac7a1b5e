"""Bundles with a domain, fitted on real images as training does."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from cascade.bundle.format import Bundle
from cascade.bundle.schema import DomainCard
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.model import backbone as backbones
from cascade.model.domain import pooled
from tests.helpers.bundles import handmade
from training import domains


@torch.inference_mode()
def activations(bundle: Bundle, images: Sequence[Image.Image], stage: int) -> Tensor:
    """Pooled activations float32 [N, D] of the plain backbone before a stage."""
    backbone = backbones.load(bundle.card.backbone.name, bundle.card.backbone.source)
    transform = bundle.preprocessing.transform()
    x = torch.stack([transform(image) for image in images])
    return pooled(PlainExecutor(backbone, WeightCache(2**30)).run(x, 0, stage))


def with_domain(bundle: Bundle, images: Sequence[Image.Image], stage: int = 2) -> Bundle:
    """The bundle with the domain of ``images``."""
    domain = domains.fit(activations(bundle, images, stage))
    return replace(bundle, domain=domain, card=bundle.card.model_copy(update={"domain": DomainCard(stage=stage)}))


def late_and_early(photos: list[Image.Image], clothes: list[Image.Image], stage: int) -> list[Bundle]:
    """One whose mask begins at the stage of dispatch, and one whose mask begins earlier."""
    late = handmade(photos[:40], name="photos", mask_from=stage, experts=2)
    early = handmade(clothes[:40], name="clothes", mask_from=0, experts=0, seed=1)
    return [with_domain(late, photos[:200], stage), with_domain(early, clothes[:200], stage)]
