"""Bundles with two input sizes, made by hand."""

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from cascade.bundle.format import Bundle
from cascade.bundle.schema import DeferralCard, MaskCard
from cascade.model import backbone as backbones
from cascade.model.masks import frozen
from tests.helpers.bundles import handmade


def two_sizes(
    images: Sequence[Image.Image],
    *,
    threshold: float = 0.5,
    name: str = "hand",
    mask_from: int = 0,
    plain: bool = False,
    seed: int = 0,
) -> Bundle:
    """A bundle without experts at 32 px, and at 64 px under a mask of its own; ``plain``: under none."""
    small = handmade([*images], name=name, experts=0, size=32, mask_from=mask_from, seed=seed)
    large = handmade([*images], experts=0, size=64, mask_from=mask_from, seed=seed + 1)
    mask, card = large.dispatcher, large.card.masks[0]
    if plain:
        backbone = backbones.load(small.card.backbone.name, small.card.backbone.source)
        mask = frozen(backbone)
        card = MaskCard(name="dispatcher", start=mask.start, weights=0, density=1.0)
        mask = replace(mask, name="dispatcher")
    deferral = DeferralCard(
        threshold=threshold, lose=0.3, share=0.5, preprocessing=large.preprocessing.to_json(), mask=card
    )
    whole = small.card.model_copy(update={"format": 2, "deferral": deferral})
    of_larger = whole.larger()
    assert of_larger is not None
    larger = replace(large, card=of_larger, dispatcher=mask, ood=None, banks={})
    return replace(small, card=whole, larger=larger)
