"""The answer for an image that fits no bundle, with the option ``unknown: embedding``: the frozen backbone's features.

Such an image continues from the stage of dispatch under a bundle without name, mask and head, in a pass with others.
"""

from dataclasses import replace

from torch import Tensor

from cascade.bundle.bundle import Bundle
from cascade.bundle.schema import Card, MaskCard
from cascade.engine.dispatch_table import Space
from cascade.engine.executors import Executor
from cascade.engine.items import Entry, Item, OpenItem
from cascade.engine.results import Dispatch, Label, Prediction
from cascade.model.fusion import Fusion, Identity, Mode
from cascade.model.masks import frozen
from cascade.model.router import Calibration


def frozen_bundle(space: Space, executor: Executor, device: str) -> Bundle:
    """The plain backbone of a space as a bundle, whose embedding is its features."""
    backbone, mask = executor.backbone, executor.pack(frozen(executor.backbone))
    card = Card(
        format=2,
        backbone=space.targets[0].backbone,
        preprocessing=space.preprocessing.to_json(),
        masks=[MaskCard(name=mask.name, start=mask.start, weights=0, density=1.0)],
        mode="dispatcher",
        dim=backbone.features,
    )
    fusions: dict[Mode, Fusion] = {"dispatcher": Identity.of(backbone.features)}
    return Bundle("", "", card, space.preprocessing, mask, (), None, Calibration(), None, fusions).to(device)


def frozen_item(bundle: Bundle, stage: int, item: OpenItem, pixels: Tensor, x: Tensor, likely: list[Label]) -> Item:
    """Make the item of an image that fits no bundle.

    Args:
        bundle: from ``frozen_bundle``. stage: of the dispatch.
        pixels, x: of the image: in this space, and the activations at the stage.
        likely: the nearest bundles that the caller may use, with their probabilities.
    """
    options = replace(item.options, embedding=True, labels=0, neighbors=0)
    entry = Entry(stage, x) if stage else None
    return Item(bundle, "dispatcher", options, pixels, entry, Dispatch(0.0, tuple(likely), 0))


def completed(answer: Prediction) -> Prediction:
    """Mark the answer of an image that fits no bundle; others stay as they are."""
    return answer if answer.bundle else replace(answer, cluster=-1, confidence=0.0, ood=1.0, masks=())
