"""Add classes without training: a bundle's head follows in closed form from statistics stored in the bundle.

The mask does not change, so a new class costs one pass over its images. See ``cascade.model.discriminant``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cascade.bundle.format import Bundle, check, read, write
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.model import backbone as backbones
from cascade.model.discriminant import Discriminant
from cascade.model.heads import Linear
from training import domains, embed, heads
from training.data import dataset
from training.run import Run, split_validation

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
CACHE = 2**34  # bytes of materialized weights


@dataclass(frozen=True)
class Added:
    """The result of ``add``.

    Attributes:
        path: the new bundle. images: their number by class.
        held_out, accuracy: number of held-out new images, and accuracy on them of a head fitted to the rest, in [0, 1];
            NaN without any.
    """

    path: Path
    images: dict[str, int]
    held_out: int
    accuracy: float


def fit(run: Run, name: str) -> Discriminant:
    """Compute the statistics of a run's training images under a mask (or ``frozen``).

    Ridge and temperature are chosen on the validation images.
    """
    labels = run.images.labels
    assert labels is not None
    features, (train, validation) = run.features(name)[0], run.rows
    classes = len(run.images.classes)
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    part = Discriminant.of(x[train], y[train], classes)
    chosen = validation if len(validation) else train
    tried = [replace(part, ridge=torch.tensor([ridge])) for ridge in RIDGES]
    best = max(tried, key=lambda each: heads.accuracy(each.head(), features[chosen], labels[chosen]))
    temperature = heads.calibrated(best.head(), features[chosen], labels[chosen])[1]
    return Discriminant.of(x, y, classes, float(best.ridge), temperature)


def add(path: Path, folder: Path, out: Path, weights: Path | None = None) -> Added:
    """Copy a bundle to ``out`` (``<name>/<version>``), with the classes and images of a folder added.

    Args:
        folder: one subfolder per class, new or existing.
        weights: a checkpoint that replaces the bundle's own weight source.

    Raises:
        CascadeError: the bundle was not trained with ``--extensible``, can't be read or does not fit its backbone; the
            folder has no classes; or ``out`` exists.
    """
    bundle, statistics = _extensible(path)
    images = dataset.class_folders(folder)
    assert images.labels is not None
    classes = [*bundle.card.classes, *(name for name in images.classes if name not in bundle.card.classes)]
    labels = np.array([classes.index(name) for name in images.classes])[images.labels]
    backbone = backbones.load(bundle.card.backbone.name, bundle.card.backbone.source, weights)
    check(bundle, backbone)
    executor = PlainExecutor(backbone, WeightCache(CACHE))
    pixels = embed.cropped(map(images.open, range(len(images))), bundle.preprocessing)
    features = embed.blocks(executor, [bundle.dispatcher], embed.normalized(pixels, bundle.preprocessing))[0]
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    train, held_out = split_validation(labels, seed=0)
    partly = statistics.add(x[train], y[train], len(classes)).head()
    accuracy = heads.accuracy(partly, features[held_out], labels[held_out]) if len(held_out) else float("nan")
    grown = statistics.add(x, y, len(classes))
    counts = {name: int((images.labels == i).sum()) for i, name in enumerate(images.classes)}
    measured = {"held_out_images": len(held_out), "accuracy": None if np.isnan(accuracy) else round(accuracy, 4)}
    domain = bundle.domain
    if domain is not None and bundle.card.domain is not None:
        seen = domains.features(executor, pixels, bundle.preprocessing, bundle.card.domain.stage)
        share = len(images) / float(grown.counts.sum())
        domain = domains.merge(domain, domains.fit(seen), share)
    changed = _with_head(bundle, grown, classes, {"added": counts}, {"new_images": measured})
    return Added(write(replace(changed, domain=domain), out), counts, len(held_out), accuracy)


def remove(path: Path, names: Sequence[str], out: Path) -> Path:
    """Copy a bundle to ``out`` without some of its classes.

    Raises:
        CascadeError: it was not trained with ``--extensible``, has no such class, or fewer than two would be left.
    """
    bundle, statistics = _extensible(path)
    classes = bundle.card.classes
    if unknown := [name for name in names if name not in classes]:
        raise CascadeError(f"{path} has no class {', '.join(unknown)}; it has: {', '.join(classes)}")
    rest = [i for i, name in enumerate(classes) if name not in names]
    if len(rest) < 2:
        raise CascadeError(f"{len(rest)} of {len(classes)} classes would be left: a classifier needs two")
    left = [classes[i] for i in rest]
    return write(_with_head(bundle, statistics.keep(rest), left, {"removed": sorted(names)}, {}), out)


def next_version(path: Path) -> Path:
    """The folder for the next version of a bundle: next to it, with the next free number."""
    path = path.absolute()
    versions = [int(p.name) for p in path.parent.iterdir() if p.name.isascii() and p.name.isdigit()]
    return path.parent / str(max(versions, default=0) + 1)


def _extensible(path: Path) -> tuple[Bundle, Discriminant]:
    bundle = read(path)
    if bundle.discriminant is None:
        raise CascadeError(
            f"{path} does not keep what new classes need: write it again with cascade train --labels --extensible;"
            " with the same --run folder nothing is trained twice"
        )
    return bundle, bundle.discriminant


def _with_head(
    bundle: Bundle, kept: Discriminant, classes: list[str], what: dict[str, Any], accuracy: dict[str, Any]
) -> Bundle:
    """Replace the bundle's head by that of these statistics; its bank keeps the rows of the remaining classes.

    A larger input size is dropped, since its head and the threshold belong to the old classes.
    """
    head = kept.head()
    training = bundle.card.training | {"heads": [*bundle.card.training.get("heads", []), what]}
    changes = {"classes": classes, "training": training, "accuracy": accuracy, "deferral": None}
    changed = replace(
        bundle,
        card=bundle.card.model_copy(update=changes),
        linear={"dispatcher": Linear(head.weight.half(), head.bias)},
        discriminant=kept,
        larger=None,
    )
    if (bank := bundle.banks.get("dispatcher")) is None:
        return changed
    rows = [i for i, label in enumerate(bank.labels) if label in classes]
    if not rows:
        return replace(changed, banks={}, thumbnails=None, map=None)
    thumbnails = None if bundle.thumbnails is None else bundle.thumbnails.take(rows)
    places = None if bundle.map is None else bundle.map.take(rows)
    return replace(changed, banks={"dispatcher": bank.take(rows)}, thumbnails=thumbnails, map=places)
